// The peer: a C++ gRPC server that says what skeyd says, from its own memory, with one copy into each message.
//
//   server ADDRESS... KEYS
//
// listens on gRPC addresses and holds KEYS keys of one VM, whatever it is called, from gfn 0 on. It says its ports on
// standard output and ends with standard input. Written as one writes a C++ gRPC server: generated messages, the
// synchronous API, and no tricks.

#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "keys.h"
#include "skeyd/v1/storage_key_service.grpc.pb.h"

namespace pb = skeyd::v1;

namespace {

constexpr uint32_t kDefaultChunk = 262144;
constexpr uint32_t kMostChunk = 1048576;

class Service final : public pb::StorageKeyService::Service {
  public:
    explicit Service(size_t count) : keys_(count) {}

    grpc::Status GetSkeys(grpc::ServerContext *, const pb::GetSkeysRequest *request,
                          grpc::ServerWriter<pb::GetSkeysResponse> *writer) override {
        std::vector<std::pair<size_t, size_t>> ranges;
        for (const auto &one : request->ranges()) {
            if (one.count() == 0 || one.start_gfn() > keys_.size() || one.count() > keys_.size() - one.start_gfn())
                return {grpc::OUT_OF_RANGE, "no such frames"};
            ranges.emplace_back(one.start_gfn(), one.start_gfn() + one.count());
        }
        if (ranges.empty()) ranges.emplace_back(0, keys_.size());
        size_t most = request->max_chunk_keys() ? request->max_chunk_keys() : kDefaultChunk;
        if (most > kMostChunk) return {grpc::INVALID_ARGUMENT, "chunks are smaller"};
        pb::GetSkeysResponse response;
        auto *header = response.mutable_header();
        header->set_vm(request->vm());
        header->set_frame_size(4096);
        header->set_uses_storage_keys(true);
        auto *slot = header->add_memory_slots();
        slot->set_count(keys_.size());
        for (const auto &[start, end] : ranges) {
            auto *one = header->add_ranges();
            one->set_start_gfn(start);
            one->set_count(end - start);
        }
        writer->Write(response);
        uint64_t total = 0;
        Crc whole;
        for (const auto &[start, end] : ranges) {
            for (size_t at = start; at < end; at += most) {
                size_t here = std::min(most, end - at);
                auto *chunk = response.mutable_chunk();
                chunk->set_start_gfn(at);
                chunk->set_count(static_cast<uint32_t>(here));
                chunk->set_encoding(pb::ENCODING_RAW);
                chunk->set_data(keys_.data() + at, here);
                uint32_t crc = crc_of(keys_.data() + at, here);
                chunk->set_crc32(crc);
                whole.add(crc, here);
                total += here;
                if (!writer->Write(response)) return {grpc::CANCELLED, "the client is gone"};
            }
        }
        auto *trailer = response.mutable_trailer();
        trailer->set_keys(total);
        trailer->set_crc32(whole.value());
        writer->Write(response);
        return grpc::Status::OK;
    }

    grpc::Status SetSkeys(grpc::ServerContext *,
                          grpc::ServerReaderWriter<pb::SetSkeysResponse, pb::SetSkeysRequest> *stream) override {
        pb::SetSkeysRequest request;
        pb::SetSkeysResponse response;
        if (!stream->Read(&request) || !request.has_header() || request.header().ranges_size() != 1)
            return {grpc::INVALID_ARGUMENT, "a header with one range comes first"};
        size_t next = request.header().ranges(0).start_gfn();
        size_t end = next + request.header().ranges(0).count();
        if (end > keys_.size()) return {grpc::OUT_OF_RANGE, "no such frames"};
        response.mutable_begun()->set_next_gfn(next);
        stream->Write(response);
        uint64_t total = 0;
        Crc whole;
        while (stream->Read(&request)) {
            if (request.has_commit()) {
                if (next != end) return {grpc::ABORTED, "keys are missing"};
                auto *result = response.mutable_result();
                result->set_keys_set(total);
                result->set_outcome(pb::SetSkeysResponse::OUTCOME_APPLIED);
                result->set_crc32(whole.value());
                stream->Write(response);
                return grpc::Status::OK;
            }
            const auto &chunk = request.chunk();
            const auto &data = chunk.data();
            if (chunk.start_gfn() != next || chunk.count() > end - next || data.size() != chunk.count() ||
                chunk.encoding() != pb::ENCODING_RAW)
                return {grpc::INVALID_ARGUMENT, "not the chunk that comes next"};
            uint32_t crc = crc_of(data.data(), data.size());
            if (crc != chunk.crc32()) return {grpc::DATA_LOSS, "the checksum is wrong"};
            if (any_reserved(data.data(), data.size())) return {grpc::INVALID_ARGUMENT, "a reserved bit"};
            memcpy(keys_.data() + next, data.data(), data.size());
            next += data.size();
            total += data.size();
            whole.add(crc, data.size());
            auto *progress = response.mutable_progress();
            progress->set_next_gfn(next);
            progress->set_keys_set(total);
            progress->set_crc32(whole.value());
            stream->Write(response);
        }
        return {grpc::ABORTED, "the stream ended without Commit"};
    }

    grpc::Status GetSkey(grpc::ServerContext *, const pb::GetSkeyRequest *request,
                         pb::GetSkeyResponse *response) override {
        if (request->gfn() >= keys_.size()) return {grpc::OUT_OF_RANGE, "no such frame"};
        response->set_key(static_cast<unsigned char>(keys_[request->gfn()]));
        response->set_call(pb::KEY_CALL_SKEYS);
        return grpc::Status::OK;
    }

  private:
    std::vector<char> keys_;
};

}  // namespace

int main(int argc, char **argv) {
    if (argc < 3) {
        std::cerr << "usage: server ADDRESS... KEYS\n";
        return 2;
    }
    Service service(std::strtoull(argv[argc - 1], nullptr, 10));
    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    std::vector<int> ports(static_cast<size_t>(argc - 2));
    for (int at = 1; at < argc - 1; at++)
        builder.AddListeningPort(argv[at], grpc::InsecureServerCredentials(), &ports[static_cast<size_t>(at - 1)]);
    builder.RegisterService(&service);
    std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
    if (!server || std::count(ports.begin(), ports.end(), 0)) {
        std::cerr << "server: can't listen\n";
        return 1;
    }
    printf("{\"ports\": [");
    for (size_t at = 0; at < ports.size(); at++) printf("%s%d", at ? ", " : "", ports[at]);
    printf("]}\n");
    fflush(stdout);
    while (getchar() != EOF) {
    }
    server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(1));
    return 0;
}

// The C++ client: measures whatever serves the contract, skeyd or the peer, in the same way.
//
//   client TARGET
//
// takes commands from standard input, one a line ("get vm=vms/a chunk=1048576"), and answers each with one line of JSON;
// {"error": ...} where it failed. It ends with its standard input.
//
//   get vm= [first= count=] [chunk=] [encodings=raw,runs,zstd] [check=0|1]
//       One GetSkeys, decoded and (check=1) each key's checksum looked at, as any client should.
//       seconds, cpu (of this process), keys, bytes (of messages, with gRPC's prefix), encoded (chunks by encoding)
//   set vm= file= [chunk=] [enable=0|1]
//       One SetSkeys with the keys of a file, from gfn 0 on. seconds, cpu, keys, bytes
//   latency what=health|key|range calls= [vm=] [gfn=] [count=] [every_us=] [timeout_ms=]
//       Calls one after the other: microseconds of each that succeeded, and how many failed.
//   streams n= vm= [chunk=] [encodings=]
//       Begins n GetSkeys, each over and over on a connection of its own. A refused one is tried again.
//   stop
//       Ends them. seconds, calls, keys, refused, failed
//   stall n= vm= [chunk=]
//       Begins n GetSkeys and reads the header only. `stop` ends them too.
//   memory
//       Resident kibibytes of this process, now and at most.

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "grpc/health/v1/health.grpc.pb.h"
#include "keys.h"
#include "skeyd/v1/storage_key_service.grpc.pb.h"

namespace pb = skeyd::v1;

namespace {

using Arguments = std::map<std::string, std::string>;

constexpr size_t kPrefix = 5;  // a flag and a length before each message on the wire

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double cpu() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

std::string text(const Arguments &given, const std::string &name, const std::string &otherwise) {
    auto found = given.find(name);
    return found == given.end() ? otherwise : found->second;
}

uint64_t number(const Arguments &given, const std::string &name, uint64_t otherwise) {
    auto found = given.find(name);
    return found == given.end() ? otherwise : std::stoull(found->second);
}

[[noreturn]] void fail(const std::string &why) { throw std::runtime_error(why); }

void require(const grpc::Status &status) {
    if (!status.ok()) fail("status " + std::to_string(status.error_code()) + ": " + status.error_message());
}

std::shared_ptr<grpc::Channel> connect(const std::string &target) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    auto channel = grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
    if (!channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(20)))
        fail("can't connect to " + target);
    return channel;
}

pb::GetSkeysRequest get_request(const Arguments &given) {
    pb::GetSkeysRequest request;
    request.set_vm(text(given, "vm", ""));
    if (uint64_t count = number(given, "count", 0)) {
        auto *range = request.add_ranges();
        range->set_start_gfn(number(given, "first", 0));
        range->set_count(count);
    }
    request.set_max_chunk_keys(static_cast<uint32_t>(number(given, "chunk", 0)));
    std::istringstream names(text(given, "encodings", ""));
    for (std::string name; std::getline(names, name, ',');) {
        if (name == "raw") request.add_encodings(pb::ENCODING_RAW);
        else if (name == "runs") request.add_encodings(pb::ENCODING_RUNS);
        else if (name == "zstd") request.add_encodings(pb::ENCODING_ZSTD);
        else fail("there is no encoding " + name);
    }
    return request;
}

// Decodes chunks into memory that it keeps.
class Decoder {
  public:
    // The keys of a chunk, up to the next call.
    const char *decode(const pb::Chunk &chunk) {
        const std::string &data = chunk.data();
        size_t count = chunk.count();
        if (count == 0 || count > 1048576) fail("a chunk of a wrong size");
        switch (chunk.encoding()) {
            case pb::ENCODING_RAW:
                if (data.size() != count) fail("a raw chunk of a wrong size");
                return data.data();
            case pb::ENCODING_ZSTD:
                keys_.resize(1048576);
                if (ZSTD_getFrameContentSize(data.data(), data.size()) != count) fail("a frame of a wrong size");
                if (ZSTD_decompressDCtx(context_.get(), keys_.data(), count, data.data(), data.size()) != count)
                    fail("a broken frame");
                return keys_.data();
            case pb::ENCODING_RUNS:
                return runs(data, count);
            default:
                fail("an encoding that was not asked for");
        }
    }

  private:
    // docs/encodings.md: lengths less one as 16-bit little-endian numbers, then keys. All are checked before any is taken.
    const char *runs(const std::string &data, size_t count) {
        size_t runs = data.size() / 3, total = runs;
        if (runs == 0 || data.size() % 3 || data.size() >= count) fail("runs of a wrong size");
        const auto *lengths = reinterpret_cast<const unsigned char *>(data.data());
        for (size_t at = 0; at < runs; at++) total += lengths[2 * at] + 256u * lengths[2 * at + 1];
        if (total != count) fail("runs of another length");
        keys_.resize(1048576);
        char *to = keys_.data();
        for (size_t at = 0; at < runs; at++) {
            size_t length = 1 + lengths[2 * at] + 256u * lengths[2 * at + 1];
            memset(to, data[2 * runs + at], length);
            to += length;
        }
        return keys_.data();
    }

    std::vector<char> keys_;
    std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context_{ZSTD_createDCtx(), &ZSTD_freeDCtx};
};

std::string get(const std::shared_ptr<grpc::Channel> &channel, const Arguments &given) {
    auto stub = pb::StorageKeyService::NewStub(channel);
    bool check = number(given, "check", 1);
    pb::GetSkeysRequest request = get_request(given);
    pb::GetSkeysResponse response;
    Decoder decoder;
    Crc whole;
    uint64_t keys = 0, bytes = 0;
    std::map<int, uint64_t> encoded;
    bool ended = false;
    double began = now(), began_cpu = cpu();
    grpc::ClientContext context;
    auto reader = stub->GetSkeys(&context, request);
    while (reader->Read(&response)) {
        bytes += response.ByteSizeLong() + kPrefix;
        if (response.has_chunk()) {
            const pb::Chunk &chunk = response.chunk();
            const char *here = decoder.decode(chunk);
            encoded[chunk.encoding()]++;
            keys += chunk.count();
            if (check) {
                uint32_t crc = crc_of(here, chunk.count());
                if (crc != chunk.crc32()) fail("a checksum is wrong");
                whole.add(crc, chunk.count());
            }
        } else if (response.has_trailer()) {
            ended = true;
            if (response.trailer().keys() != keys) fail("keys are missing");
            if (check && response.trailer().crc32() != whole.value()) fail("the trailer's checksum is wrong");
        }
    }
    require(reader->Finish());
    double took = now() - began, used = cpu() - began_cpu;
    if (!ended) fail("no trailer came");
    std::ostringstream said;
    said.precision(9);
    said << "{\"seconds\": " << took << ", \"cpu\": " << used << ", \"keys\": " << keys << ", \"bytes\": " << bytes
         << ", \"encoded\": {";
    const char *between = "";
    for (const auto &[encoding, chunks] : encoded) {
        said << between << "\"" << pb::Encoding_Name(static_cast<pb::Encoding>(encoding)) << "\": " << chunks;
        between = ", ";
    }
    said << "}}";
    return said.str();
}

// A file in memory.
class File {
  public:
    explicit File(const std::string &path) {
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        struct stat about {};
        if (fd < 0 || fstat(fd, &about)) fail("can't open " + path);
        size_ = static_cast<size_t>(about.st_size);
        void *mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
        close(fd);
        if (mapped == MAP_FAILED) fail("can't map " + path);
        data_ = static_cast<const char *>(mapped);
    }
    ~File() { munmap(const_cast<char *>(data_), size_); }
    File(const File &) = delete;
    File &operator=(const File &) = delete;
    const char *data() const { return data_; }
    size_t size() const { return size_; }

  private:
    const char *data_;
    size_t size_;
};

std::string set(const std::shared_ptr<grpc::Channel> &channel, const Arguments &given) {
    auto stub = pb::StorageKeyService::NewStub(channel);
    File file(text(given, "file", ""));
    size_t most = number(given, "chunk", 1048576);
    uint64_t bytes = 0;
    pb::SetSkeysRequest request;
    double began = now(), began_cpu = cpu();
    grpc::ClientContext context;
    auto stream = stub->SetSkeys(&context);
    uint64_t keys_set = 0;
    uint32_t crc32 = 0;
    bool applied = false, first = true;
    std::thread answers([&] {
        pb::SetSkeysResponse response;
        while (stream->Read(&response)) {
            if (response.has_result()) {
                applied = true;
                keys_set = response.result().keys_set();
                crc32 = response.result().crc32();
            } else if (response.has_begun() && !first) {
                return;  // nothing begins twice: Finish will not be OK, or the result is missing
            }
            first = false;
        }
    });
    auto *header = request.mutable_header();
    header->set_vm(text(given, "vm", ""));
    header->set_allow_enable(number(given, "enable", 1));
    header->add_ranges()->set_count(file.size());
    bool open = stream->Write(request);
    Crc whole;
    for (size_t at = 0; open && at < file.size(); at += most) {
        size_t here = std::min(most, file.size() - at);
        auto *chunk = request.mutable_chunk();
        chunk->set_start_gfn(at);
        chunk->set_count(static_cast<uint32_t>(here));
        chunk->set_encoding(pb::ENCODING_RAW);
        chunk->set_data(file.data() + at, here);
        uint32_t crc = crc_of(file.data() + at, here);
        chunk->set_crc32(crc);
        whole.add(crc, here);
        bytes += request.ByteSizeLong() + kPrefix;
        open = stream->Write(request);
    }
    if (open) {
        request.mutable_commit();
        stream->Write(request);
    }
    stream->WritesDone();
    answers.join();
    require(stream->Finish());
    double took = now() - began, used = cpu() - began_cpu;
    if (!applied || keys_set != file.size()) fail("not all keys were set");
    if (crc32 && crc32 != whole.value()) fail("other keys were set");
    std::ostringstream said;
    said.precision(9);
    said << "{\"seconds\": " << took << ", \"cpu\": " << used << ", \"keys\": " << keys_set << ", \"bytes\": " << bytes
         << "}";
    return said.str();
}

std::string latency(const std::shared_ptr<grpc::Channel> &channel, const Arguments &given) {
    auto keys = pb::StorageKeyService::NewStub(channel);
    auto health = grpc::health::v1::Health::NewStub(channel);
    std::string what = text(given, "what", "");
    uint64_t calls = number(given, "calls", 1000), gfn = number(given, "gfn", 0);
    auto every = std::chrono::microseconds(number(given, "every_us", 0));
    auto timeout = std::chrono::milliseconds(number(given, "timeout_ms", 10000));
    std::string vm = text(given, "vm", "");
    Arguments of_range = given;
    of_range["first"] = std::to_string(gfn);
    pb::GetSkeysRequest range = get_request(of_range);
    std::vector<double> took;
    uint64_t failed = 0;
    std::string why;
    auto next = std::chrono::steady_clock::now();
    for (uint64_t call = 0; call < calls; call++) {
        if (every.count()) {
            std::this_thread::sleep_until(next);
            next = std::max(next + every, std::chrono::steady_clock::now());
        }
        grpc::ClientContext context;
        context.set_deadline(std::chrono::system_clock::now() + timeout);
        grpc::Status status;
        double began = now();
        if (what == "health") {
            grpc::health::v1::HealthCheckResponse response;
            status = health->Check(&context, grpc::health::v1::HealthCheckRequest(), &response);
        } else if (what == "key") {
            pb::GetSkeyRequest request;
            pb::GetSkeyResponse response;
            request.set_vm(vm);
            request.set_gfn(gfn);
            status = keys->GetSkey(&context, request, &response);
        } else if (what == "range") {
            pb::GetSkeysResponse response;
            auto reader = keys->GetSkeys(&context, range);
            while (reader->Read(&response)) {
            }
            status = reader->Finish();
        } else {
            fail("there is no call " + what);
        }
        double ended = now();
        if (status.ok()) {
            took.push_back((ended - began) * 1e6);
        } else {
            failed++;
            why = std::to_string(status.error_code());
        }
    }
    std::ostringstream said;
    said.precision(6);
    said << "{\"failed\": " << failed << ", \"code\": \"" << why << "\", \"microseconds\": [";
    const char *between = "";
    for (double one : took) {
        said << between << one;
        between = ", ";
    }
    said << "]}";
    return said.str();
}

// Streams in the background.
class Streams {
  public:
    void begin(const std::string &target, const Arguments &given, bool stalled) {
        began_ = now();
        pb::GetSkeysRequest request = get_request(given);
        for (uint64_t n = number(given, "n", 1); n; n--)
            threads_.emplace_back([this, request, stalled, channel = connect(target)] { run(channel, request, stalled); });
    }

    std::string stop() {
        double took = now() - began_;
        ending_ = true;
        for (auto &thread : threads_) thread.join();
        threads_.clear();
        ending_ = false;
        std::ostringstream said;
        said << "{\"seconds\": " << took << ", \"calls\": " << calls_.exchange(0) << ", \"keys\": " << keys_.exchange(0)
             << ", \"refused\": " << refused_.exchange(0) << ", \"failed\": " << failed_.exchange(0) << "}";
        return said.str();
    }

    ~Streams() {
        if (!threads_.empty()) stop();
    }

  private:
    void run(const std::shared_ptr<grpc::Channel> &channel, const pb::GetSkeysRequest &request, bool stalled) {
        auto stub = pb::StorageKeyService::NewStub(channel);
        pb::GetSkeysResponse response;
        while (!ending_) {
            grpc::ClientContext context;
            auto reader = stub->GetSkeys(&context, request);
            while (reader->Read(&response)) {
                if (response.has_chunk()) keys_ += response.chunk().count();
                while (stalled && !ending_) std::this_thread::sleep_for(std::chrono::milliseconds(10));
                if (ending_) context.TryCancel();
            }
            grpc::Status status = reader->Finish();
            if (status.ok()) {
                calls_++;
            } else if (status.error_code() == grpc::RESOURCE_EXHAUSTED) {
                refused_++;
                std::this_thread::sleep_for(std::chrono::milliseconds(100));
            } else if (!ending_) {
                failed_++;
                std::this_thread::sleep_for(std::chrono::milliseconds(100));
            }
        }
    }

    double began_ = 0;
    std::vector<std::thread> threads_;
    std::atomic<bool> ending_{false};
    std::atomic<uint64_t> calls_{0}, keys_{0}, refused_{0}, failed_{0};
};

std::string memory() {
    std::ifstream about("/proc/self/status");
    std::string now_kib = "0", most_kib = "0";
    for (std::string word; about >> word;) {
        if (word == "VmRSS:") about >> now_kib;
        if (word == "VmHWM:") about >> most_kib;
    }
    return "{\"now_kib\": " + now_kib + ", \"most_kib\": " + most_kib + "}";
}

std::string quoted(const std::string &words) {
    std::string said = "\"";
    for (char one : words) {
        if (one == '"' || one == '\\') said += '\\';
        said += static_cast<unsigned char>(one) < ' ' ? ' ' : one;
    }
    return said + "\"";
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 2) {
        std::cerr << "usage: client TARGET\n";
        return 2;
    }
    std::shared_ptr<grpc::Channel> channel;
    Streams streams;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string command;
        words >> command;
        Arguments given;
        for (std::string word; words >> word;) {
            size_t equals = word.find('=');
            given[word.substr(0, equals)] = equals == std::string::npos ? "" : word.substr(equals + 1);
        }
        std::string answer;
        try {
            if (!channel) channel = connect(argv[1]);
            if (command == "get") answer = get(channel, given);
            else if (command == "set") answer = set(channel, given);
            else if (command == "latency") answer = latency(channel, given);
            else if (command == "streams" || command == "stall") streams.begin(argv[1], given, command == "stall"), answer = "{}";
            else if (command == "stop") answer = streams.stop();
            else if (command == "memory") answer = memory();
            else fail("there is no command " + command);
        } catch (const std::exception &error) {
            answer = "{\"error\": " + quoted(error.what()) + "}";
        }
        std::cout << answer << std::endl;
    }
    return 0;
}

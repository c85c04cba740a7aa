// What the C++ server and client share: checksums of keys, checked as the contract has it.

#pragma once

#include <zlib.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

inline uint32_t crc_of(const char *keys, size_t count) {
    return static_cast<uint32_t>(crc32_z(0, reinterpret_cast<const Bytef *>(keys), count));
}

// A checksum that goes on. Each key is looked at once: that of the whole is combined from those of the parts.
class Crc {
  public:
    void add(uint32_t part, size_t count) {
        if (count != count_) {
            count_ = count;
            operator_ = crc32_combine_gen(static_cast<z_off_t>(count));
        }
        value_ = static_cast<uint32_t>(crc32_combine_op(value_, part, operator_));
    }
    uint32_t value() const { return value_; }

  private:
    uint32_t value_ = 0;
    size_t count_ = 0;
    uLong operator_ = 0;
};

// Whether a key has the reserved bit.
inline bool any_reserved(const char *keys, size_t count) {
    uint64_t found = 0;
    size_t at = 0;
    for (; at + 8 <= count; at += 8) {
        uint64_t eight;
        memcpy(&eight, keys + at, 8);
        found |= eight;
    }
    unsigned char rest = 0;
    for (; at < count; at++) rest |= static_cast<unsigned char>(keys[at]);
    return (found & 0x0101010101010101u) || (rest & 1);
}

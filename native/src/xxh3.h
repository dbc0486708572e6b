// XXH3 of 128 bits, seed 0, default secret: the digest that a checkpoint carries for every block of its files.
// Thread safety: free functions without state. Ownership: they borrow what they are given, for the call.
//
// Our own code, written from the published specification (version 0.2.0, doc/xxhash_spec.md in
// https://github.com/Cyan4973/xxHash): a third-party header can't be had on a machine that has only a compiler.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sllm {

// Writes the digest of `length` bytes in its canonical form, which is big-endian.
void xxh3_128(const void* data, std::size_t length, uint8_t digest[16]);

// How many bytes at once the loop over long inputs takes. The widest that the machine offers is what xxh3_128 uses;
// the others are for tests, and give the same digests.
enum class Xxh3Width { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

bool xxh3_offers(Xxh3Width width) noexcept;
// The width must be one that is offered.
void xxh3_128(const void* data, std::size_t length, uint8_t digest[16], Xxh3Width width);

}  // namespace sllm

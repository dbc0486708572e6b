// What a test needs of xxh3.cc, in C: each width of its loop by itself, which the C ABI does not tell apart.
// Thread safety, ownership: as xxh3.h says.
#include "xxh3.h"

extern "C" {

int xxh3_offers(int width) { return sllm::xxh3_offers(static_cast<sllm::Xxh3Width>(width)) ? 1 : 0; }

void xxh3_digest(const void* data, uint64_t length, uint8_t* digest) { sllm::xxh3_128(data, length, digest); }

void xxh3_digest_by(int width, const void* data, uint64_t length, uint8_t* digest) {
  sllm::xxh3_128(data, length, digest, static_cast<sllm::Xxh3Width>(width));
}

}  // extern "C"

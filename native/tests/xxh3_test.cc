// xxh3_test holds every width of XXH3's loop against the others and against digests of the reference implementation,
// on blocks that end where their memory does: what reads past an end is for the sanitizers to see.
// Usage: xxh3_test. Thread safety, ownership: a program.
#include "xxh3.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

namespace {

using sllm::Xxh3Width;

struct Known {
  std::size_t length;
  const char* digest;
};

// Printed by python-xxhash 4.1 of the bytes that byte_at gives:
// xxhash.xxh3_128_hexdigest(bytes(k * 2654435761 >> 13 & 255 for k in range(length)))
constexpr Known kKnown[] = {
    {0, "99aa06d3014798d86001c324468d497f"},
    {1, "a6cd5e9392000f6ac44bdff4074eecdb"},
    {2, "59264f999f5b71511ca5cfa6a6d57dc2"},
    {3, "95c705060a313bf8a1c4a8259b827291"},
    {4, "afbf64f9281b8de2fde8d93ae8794d8e"},
    {8, "2761698c33953c430234362aaf47b71a"},
    {9, "0d39db6431d37a74895c8a562da51412"},
    {16, "29be75b0bbbb5284aafffcec5df2cb27"},
    {17, "db7e8f77961e47fd878751509ecfdb8b"},
    {128, "ba44fd018231af4cbbe087d879edcc78"},
    {129, "522c922743fd67f1b8075934107218e5"},
    {240, "4f49ccc8526aa7ad407883ea5ef95b9a"},
    {241, "50b62ee1ee6455a7bc424a2c480dd281"},
    {1024, "53bd178b75ab292e1fd15e7d36f5e1bc"},
    {1025, "d1ad5f4a3cce4374fe08e5a874d23fd2"},
    {4096, "0c263f435125451084d9e7ce664c8217"},
    {65537, "f2bc6aa18c6f210261b429f8bd154060"},
};

uint8_t byte_at(uint64_t k) { return static_cast<uint8_t>(k * 2654435761u >> 13); }

std::string digest_of(std::size_t length, Xxh3Width width, bool chosen) {
  const std::unique_ptr<uint8_t[]> data(new uint8_t[length]);
  for (std::size_t k = 0; k < length; ++k) data[k] = byte_at(k);
  uint8_t digest[16];
  if (chosen)
    sllm::xxh3_128(data.get(), length, digest);
  else
    sllm::xxh3_128(data.get(), length, digest, width);
  std::string text;
  for (const uint8_t byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

void check(std::size_t length, const std::string& expected) {
  for (const Xxh3Width width : {Xxh3Width::kPortable, Xxh3Width::kAvx2, Xxh3Width::kAvx512}) {
    if (!sllm::xxh3_offers(width) || digest_of(length, width, false) == expected) continue;
    std::fprintf(stderr, "width %d, %zu bytes: not %s\n", static_cast<int>(width), length, expected.c_str());
    std::exit(1);
  }
}

}  // namespace

int main() {
  for (const Known& known : kKnown) check(known.length, known.digest);
  for (std::size_t length = 0; length < 4200; ++length) check(length, digest_of(length, Xxh3Width::kPortable, true));
}

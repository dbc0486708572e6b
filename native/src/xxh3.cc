#include "xxh3.h"

#include <bit>
#include <cstring>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics of AVX-512 read, by intent, what has no value (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace sllm {
namespace {

__extension__ using uint128 = unsigned __int128;

constexpr uint64_t kPrime32_1 = 0x9E3779B1;
constexpr uint64_t kPrime32_2 = 0x85EBCA77;
constexpr uint64_t kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87;
constexpr uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9;
constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63;
constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t kPrimeMx1 = 0x165667919E3779F9;
constexpr uint64_t kPrimeMx2 = 0x9FB21C651E98DF25;

constexpr std::size_t kSecretBytes = 192;
alignas(64) constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d,
    0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0,
    0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0,
    0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b,
    0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac,
    0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51,
    0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34,
    0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49,
    0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8,
    0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b,
    0x40, 0x7e,
};

constexpr std::size_t kLanes = 8;
constexpr std::size_t kStripeBytes = 64;
constexpr std::size_t kStripesInBlock = (kSecretBytes - kStripeBytes) / 8;
constexpr std::size_t kBlockBytes = kStripesInBlock * kStripeBytes;
constexpr std::size_t kSmallBytes = 16;
constexpr std::size_t kMediumBytes = 240;

struct Digest {
  uint64_t low;
  uint64_t high;
};

inline uint64_t read64(const uint8_t* from) noexcept {
  uint64_t value;
  std::memcpy(&value, from, sizeof value);
  return std::endian::native == std::endian::big ? __builtin_bswap64(value) : value;
}

inline uint32_t read32(const uint8_t* from) noexcept {
  uint32_t value;
  std::memcpy(&value, from, sizeof value);
  return std::endian::native == std::endian::big ? __builtin_bswap32(value) : value;
}

inline uint64_t secret64(std::size_t offset) noexcept { return read64(kSecret + offset); }
inline uint64_t low_half(uint128 value) noexcept { return static_cast<uint64_t>(value); }
inline uint64_t high_half(uint128 value) noexcept { return static_cast<uint64_t>(value >> 64); }

inline uint64_t folded_product(uint64_t a, uint64_t b) noexcept {
  const uint128 product = uint128{a} * b;
  return low_half(product) ^ high_half(product);
}

inline uint64_t avalanche(uint64_t x) noexcept {
  x ^= x >> 37;
  x *= kPrimeMx1;
  return x ^ x >> 32;
}

inline uint64_t avalanche_xxh64(uint64_t x) noexcept {
  x ^= x >> 33;
  x *= kPrime64_2;
  x ^= x >> 29;
  x *= kPrime64_3;
  return x ^ x >> 32;
}

// ---- 0 to 16 bytes ----

Digest digest_0() noexcept {
  return {avalanche_xxh64(secret64(64) ^ secret64(72)), avalanche_xxh64(secret64(80) ^ secret64(88))};
}

Digest digest_1_to_3(const uint8_t* data, std::size_t length) noexcept {
  const uint32_t combined = uint32_t{data[length - 1]} | static_cast<uint32_t>(length) << 8 | uint32_t{data[0]} << 16 |
                            uint32_t{data[length >> 1]} << 24;
  const uint64_t low = read32(kSecret) ^ read32(kSecret + 4) ^ combined;
  const uint64_t high = read32(kSecret + 8) ^ read32(kSecret + 12) ^ std::rotl(__builtin_bswap32(combined), 13);
  return {avalanche_xxh64(low), avalanche_xxh64(high)};
}

Digest digest_4_to_8(const uint8_t* data, std::size_t length) noexcept {
  const uint64_t combined = read32(data) | uint64_t{read32(data + length - 4)} << 32;
  const uint64_t value = secret64(16) ^ secret64(24) ^ combined;
  const uint128 product = uint128{value} * (kPrime64_1 + (uint64_t{length} << 2));
  uint64_t low = low_half(product);
  const uint64_t high = high_half(product) + (low << 1);
  low ^= high >> 3;
  low ^= low >> 35;
  low *= kPrimeMx2;
  low ^= low >> 28;
  return {low, avalanche(high)};
}

Digest digest_9_to_16(const uint8_t* data, std::size_t length) noexcept {
  const uint64_t first = read64(data);
  const uint64_t last = read64(data + length - 8);
  const uint64_t mixed = secret64(32) ^ secret64(40) ^ first ^ last;
  const uint64_t keyed = secret64(48) ^ secret64(56) ^ last;
  const uint128 product = uint128{mixed} * kPrime64_1;
  uint64_t low = low_half(product) + (uint64_t{length - 1} << 54);
  const uint64_t high = high_half(product) + keyed + (keyed & 0xFFFFFFFF) * (kPrime32_2 - 1);
  low ^= __builtin_bswap64(high);
  const uint128 again = uint128{low} * kPrime64_2;
  return {avalanche(low_half(again)), avalanche(high_half(again) + high * kPrime64_2)};
}

// ---- 17 to 240 bytes ----

inline uint64_t mix_16(const uint8_t* data, std::size_t secret) noexcept {
  return folded_product(read64(data) ^ secret64(secret), read64(data + 8) ^ secret64(secret + 8));
}

struct Pair {
  uint64_t first;
  uint64_t second;

  void mix(const uint8_t* one, const uint8_t* other, std::size_t secret) noexcept {
    first = (first + mix_16(one, secret)) ^ (read64(other) + read64(other + 8));
    second = (second + mix_16(other, secret + 16)) ^ (read64(one) + read64(one + 8));
  }
};

Digest digest_17_to_240(const uint8_t* data, std::size_t length) noexcept {
  Pair sums{length * kPrime64_1, 0};
  if (length <= 128) {
    for (std::size_t rounds = (length - 1) / 32 + 1; rounds > 0; --rounds) {
      const std::size_t at = (rounds - 1) * 16;
      sums.mix(data + at, data + length - at - 16, at * 2);
    }
  } else {
    for (std::size_t at = 0; at < 128; at += 32) sums.mix(data + at, data + at + 16, at);
    sums = {avalanche(sums.first), avalanche(sums.second)};
    for (std::size_t at = 128; at + 32 <= length; at += 32) sums.mix(data + at, data + at + 16, at - 128 + 3);
    sums.mix(data + length - 16, data + length - 32, 103);
  }
  const uint64_t high = sums.first * kPrime64_1 + sums.second * kPrime64_4 + length * kPrime64_2;
  return {avalanche(sums.first + sums.second), uint64_t{0} - avalanche(high)};
}

// ---- More: eight lanes over stripes of 64 bytes, scrambled after every block of 1,024 ----

inline void add_stripe(uint64_t* lanes, const uint8_t* stripe, const uint8_t* secret) noexcept {
  for (std::size_t k = 0; k < kLanes; ++k) {
    const uint64_t word = read64(stripe + k * 8);
    const uint64_t keyed = word ^ read64(secret + k * 8);
    lanes[k ^ 1] += word;
    lanes[k] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
  }
}

using Blocks = void (*)(uint64_t* lanes, const uint8_t* data, std::size_t blocks) noexcept;

void add_blocks_portable(uint64_t* lanes, const uint8_t* data, std::size_t blocks) noexcept {
  uint64_t held[kLanes];  // Lanes that nothing else can see stay in registers.
  std::memcpy(held, lanes, sizeof held);
  for (; blocks > 0; --blocks) {
    for (std::size_t n = 0; n < kStripesInBlock; ++n, data += kStripeBytes) add_stripe(held, data, kSecret + n * 8);
    for (std::size_t k = 0; k < kLanes; ++k)
      held[k] = (held[k] ^ held[k] >> 47 ^ secret64(kSecretBytes - kStripeBytes + k * 8)) * kPrime32_1;
  }
  std::memcpy(lanes, held, sizeof held);
}

#if defined(__x86_64__)

// How far ahead of the sums the data is asked for; the hardware's own guess stops at the end of a page.
constexpr std::size_t kAheadBytes = 1024;

__attribute__((target("avx2"))) void add_blocks_avx2(uint64_t* lanes, const uint8_t* data,
                                                     std::size_t blocks) noexcept {
  const __m256i prime = _mm256_set1_epi64x(static_cast<int64_t>(kPrime32_1));
  auto* memory = reinterpret_cast<__m256i*>(lanes);
  __m256i held[2] = {_mm256_loadu_si256(memory), _mm256_loadu_si256(memory + 1)};
  for (; blocks > 0; --blocks) {
    for (std::size_t n = 0; n < kStripesInBlock; ++n, data += kStripeBytes) {
      _mm_prefetch(data + kAheadBytes, _MM_HINT_T0);
      for (std::size_t k = 0; k < 2; ++k) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data) + k);
        const __m256i secret = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kSecret + n * 8) + k);
        const __m256i keyed = _mm256_xor_si256(words, secret);
        const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        const __m256i neighbours = _mm256_shuffle_epi32(words, _MM_SHUFFLE(1, 0, 3, 2));
        held[k] = _mm256_add_epi64(held[k], _mm256_add_epi64(product, neighbours));
      }
    }
    for (std::size_t k = 0; k < 2; ++k) {
      const auto* secret = reinterpret_cast<const __m256i*>(kSecret + kSecretBytes - kStripeBytes) + k;
      const __m256i folded = _mm256_xor_si256(held[k], _mm256_srli_epi64(held[k], 47));
      const __m256i keyed = _mm256_xor_si256(folded, _mm256_loadu_si256(secret));
      const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
      held[k] = _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(high, 32));
    }
  }
  _mm256_storeu_si256(memory, held[0]);
  _mm256_storeu_si256(memory + 1, held[1]);
}

__attribute__((target("avx512f"))) void add_blocks_avx512(uint64_t* lanes, const uint8_t* data,
                                                          std::size_t blocks) noexcept {
  const __m512i prime = _mm512_set1_epi64(static_cast<int64_t>(kPrime32_1));
  const __m512i last_secret = _mm512_loadu_si512(kSecret + kSecretBytes - kStripeBytes);
  __m512i held = _mm512_loadu_si512(lanes);
  for (; blocks > 0; --blocks) {
    for (std::size_t n = 0; n < kStripesInBlock; ++n, data += kStripeBytes) {
      _mm_prefetch(data + kAheadBytes, _MM_HINT_T0);
      const __m512i words = _mm512_loadu_si512(data);
      const __m512i keyed = _mm512_xor_si512(words, _mm512_loadu_si512(kSecret + n * 8));
      const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
      const __m512i neighbours = _mm512_shuffle_epi32(words, static_cast<_MM_PERM_ENUM>(_MM_SHUFFLE(1, 0, 3, 2)));
      held = _mm512_add_epi64(held, _mm512_add_epi64(product, neighbours));
    }
    const __m512i folded = _mm512_xor_si512(held, _mm512_srli_epi64(held, 47));
    const __m512i keyed = _mm512_xor_si512(folded, last_secret);
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(keyed, 32), prime);
    held = _mm512_add_epi64(_mm512_mul_epu32(keyed, prime), _mm512_slli_epi64(high, 32));
  }
  _mm512_storeu_si512(lanes, held);
}

Blocks blocks_of(Xxh3Width width) noexcept {
  switch (width) {
    case Xxh3Width::kAvx512:
      return add_blocks_avx512;
    case Xxh3Width::kAvx2:
      return add_blocks_avx2;
    default:
      return add_blocks_portable;
  }
}

#else

Blocks blocks_of(Xxh3Width) noexcept { return add_blocks_portable; }

#endif

uint64_t merged(const uint64_t* lanes, uint64_t start, std::size_t secret) noexcept {
  for (std::size_t k = 0; k < kLanes; k += 2)
    start += folded_product(lanes[k] ^ secret64(secret + k * 8), lanes[k + 1] ^ secret64(secret + k * 8 + 8));
  return avalanche(start);
}

Digest digest_long(const uint8_t* data, std::size_t length, Blocks add_blocks) noexcept {
  uint64_t lanes[kLanes] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                            kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  // The last block is never scrambled, be it a whole one; its last stripe is the last 64 bytes, wherever they begin.
  const std::size_t blocks = (length - 1) / kBlockBytes;
  add_blocks(lanes, data, blocks);
  const uint8_t* rest = data + blocks * kBlockBytes;
  const std::size_t stripes = (length - blocks * kBlockBytes - 1) / kStripeBytes;
  for (std::size_t n = 0; n < stripes; ++n) add_stripe(lanes, rest + n * kStripeBytes, kSecret + n * 8);
  add_stripe(lanes, data + length - kStripeBytes, kSecret + kSecretBytes - 71);
  return {merged(lanes, length * kPrime64_1, 11), merged(lanes, ~(length * kPrime64_2), kSecretBytes - 75)};
}

Digest digest_of(const uint8_t* data, std::size_t length, Blocks add_blocks) noexcept {
  if (length > kMediumBytes) return digest_long(data, length, add_blocks);
  if (length > kSmallBytes) return digest_17_to_240(data, length);
  if (length > 8) return digest_9_to_16(data, length);
  if (length > 3) return digest_4_to_8(data, length);
  if (length > 0) return digest_1_to_3(data, length);
  return digest_0();
}

void write_big_endian(uint64_t value, uint8_t* to) noexcept {
  for (std::size_t k = 0; k < 8; ++k) to[k] = static_cast<uint8_t>(value >> (56 - 8 * k));
}

Xxh3Width widest() noexcept {
  if (xxh3_offers(Xxh3Width::kAvx512)) return Xxh3Width::kAvx512;
  return xxh3_offers(Xxh3Width::kAvx2) ? Xxh3Width::kAvx2 : Xxh3Width::kPortable;
}

}  // namespace

bool xxh3_offers(Xxh3Width width) noexcept {
#if defined(__x86_64__)
  // These ask the operating system too: a processor's wide registers are of no use where it does not save them.
  if (width == Xxh3Width::kAvx512) return __builtin_cpu_supports("avx512f");
  if (width == Xxh3Width::kAvx2) return __builtin_cpu_supports("avx2");
#endif
  return width == Xxh3Width::kPortable;
}

void xxh3_128(const void* data, std::size_t length, uint8_t digest[16], Xxh3Width width) {
  const Digest found = digest_of(static_cast<const uint8_t*>(data), length, blocks_of(width));
  write_big_endian(found.high, digest);
  write_big_endian(found.low, digest + 8);
}

void xxh3_128(const void* data, std::size_t length, uint8_t digest[16]) {
  static const Xxh3Width width = widest();
  xxh3_128(data, length, digest, width);
}

}  // namespace sllm

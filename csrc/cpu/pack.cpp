// Pack and unpack codes. Plain loops over bytes: a compiler's vectors keep up with memory here on any machine.
#include <cstring>

#include "cpu/parallel.h"
#include "loftq/check.h"
#include "loftq/cpu.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

namespace {

template <int kBits>
void pack_tile(const uint8_t* codes, uint8_t* packed) {
  constexpr int kRun = kTile * kBits / 8;  // bytes per tile, and columns per field
  for (int j = 0; j < kRun; ++j) {
    unsigned byte = 0;
    for (int i = 0; i < 8 / kBits; ++i) byte |= (codes[i * kRun + j] & ((1u << kBits) - 1)) << (i * kBits);
    packed[j] = static_cast<uint8_t>(byte);
  }
}

template <int kBits>
void unpack_tile(const uint8_t* packed, uint8_t* codes) {
  constexpr int kRun = kTile * kBits / 8;
  for (int i = 0; i < 8 / kBits; ++i) {
    for (int j = 0; j < kRun; ++j) codes[i * kRun + j] = packed[j] >> (i * kBits) & ((1u << kBits) - 1);
  }
}

template <int kBits>
void pack_row(const uint8_t* codes, int64_t k, uint8_t* packed) {
  constexpr int kRun = kTile * kBits / 8;
  int64_t tile = 0;
  for (; (tile + 1) * kTile <= k; ++tile) pack_tile<kBits>(codes + tile * kTile, packed + tile * kRun);
  if (tile * kTile == k) return;
  uint8_t padded[kTile] = {};
  std::memcpy(padded, codes + tile * kTile, k - tile * kTile);
  pack_tile<kBits>(padded, packed + tile * kRun);
}

template <int kBits>
void unpack_row(const uint8_t* packed, int64_t k, uint8_t* codes) {
  constexpr int kRun = kTile * kBits / 8;
  int64_t tile = 0;
  for (; (tile + 1) * kTile <= k; ++tile) unpack_tile<kBits>(packed + tile * kRun, codes + tile * kTile);
  if (tile * kTile == k) return;
  uint8_t padded[kTile];
  unpack_tile<kBits>(packed + tile * kRun, padded);
  std::memcpy(codes + tile * kTile, padded, k - tile * kTile);
}

}  // namespace

Status launch_pack_cpu(const PackParams& p, int num_threads) {
  if (Status error = check_launch(num_threads, p)) return error;
  if (p.n == 0 || p.k == 0) return nullptr;
  const auto pack = p.bits == 2 ? pack_row<2> : p.bits == 4 ? pack_row<4> : pack_row<8>;
  const int64_t bytes = row_bytes(p.k, p.bits);
  parallel_rows(useful_threads(num_threads, p.n, p.k), p.n, [&](int, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) pack(p.codes + row * p.k, p.k, p.packed + row * bytes);
  });
  return nullptr;
}

Status launch_unpack_cpu(const UnpackParams& p, int num_threads) {
  if (Status error = check_launch(num_threads, p)) return error;
  if (p.n == 0 || p.k == 0) return nullptr;
  const auto unpack = p.bits == 2 ? unpack_row<2> : p.bits == 4 ? unpack_row<4> : unpack_row<8>;
  const int64_t bytes = row_bytes(p.k, p.bits);
  parallel_rows(useful_threads(num_threads, p.n, p.k), p.n, [&](int, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) unpack(p.packed + row * bytes, p.k, p.codes + row * p.k);
  });
  return nullptr;
}

}  // namespace LOFTQ_VERSION
}  // namespace loftq

// The emulated CUDA quantize kernels against the CPU's: every output, every bit. Linked with loftq::kernels.
#include <random>

#include "../cuda/quantize.cu"
#include "harness.h"
#include "loftq/cpu.h"
#include "loftq/half.h"

namespace {

using namespace loftq;

const DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

struct Outputs {
  Guarded<uint8_t> codes;
  Guarded<char> scale, offset, residual;
  Guarded<double> norm2;
  explicit Outputs(const QuantizeParams& p)
      : codes(p.n * row_bytes(p.k, p.bits)),
        scale(p.n * num_groups(p.k, p.group_size) * size_of(p.scale_dtype)),
        offset(scale.size()),
        residual(p.n * p.k * size_of(p.residual_dtype)),
        norm2(p.n) {
    std::memset(offset.data(), 0, offset.size());
  }
  QuantizeParams of(QuantizeParams p) {
    p.codes = codes.data();
    p.scale = scale.data();
    p.offset = p.scale_rule == ScaleRule::kMinMax ? offset.data() : nullptr;
    p.residual = residual.data();
    p.residual_norm2 = norm2.data();
    return p;
  }
};

void fill(Guarded<char>& matrix, DType dtype, float scale, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  for (size_t i = 0; i < matrix.size() / size_of(dtype); ++i) {
    const float x = normal(random);
    const uint16_t bits = dtype == DType::kFloat16 ? float_to_half(x) : float_to_bfloat(x);
    std::memcpy(matrix.data() + i * size_of(dtype), dtype == DType::kFloat32 ? static_cast<const void*>(&x) : &bits,
                size_of(dtype));
  }
}

void check_parity(const QuantizeParams& p) {
  Outputs cuda(p), cpu(p);
  CHECK(launch_quantize_cuda(cuda.of(p), nullptr) == cudaSuccess, "cuda");
  const Status status = launch_quantize_cpu(cpu.of(p), 2);
  CHECK(status == nullptr, "%s", status);
  CHECK(cuda.codes.equals(cpu.codes), "codes: bits %d group %ld k %ld", p.bits, p.group_size, p.k);
  CHECK(cuda.scale.equals(cpu.scale), "scale: bits %d group %ld k %ld", p.bits, p.group_size, p.k);
  CHECK(cuda.offset.equals(cpu.offset), "offset: bits %d group %ld k %ld", p.bits, p.group_size, p.k);
  CHECK(cuda.residual.equals(cpu.residual), "residual: bits %d group %ld k %ld", p.bits, p.group_size, p.k);
  CHECK(cuda.norm2.equals(cpu.norm2), "norm2: bits %d group %ld k %ld", p.bits, p.group_size, p.k);
}

void test_formats() {
  const int64_t columns[] = {1, 63, 64, 100, 257, 1030, 1500};
  unsigned turn = 0;
  for (const int bits : kCodeBits) {
    for (const ScaleRule rule : {ScaleRule::kAbsmax, ScaleRule::kMinMax, ScaleRule::kMeanStd}) {
      for (const int64_t group_size : kGroupSizes) {
        for (const bool integer : {false, true}) {
          std::vector<float> codebook(1 << bits);
          for (int i = 0; i < 1 << bits; ++i) {
            const float t = -1.0f + 2.0f * i / ((1 << bits) - 1);
            codebook[i] = integer ? i - (1 << bits) / 2 : std::copysign(std::pow(std::fabs(t), 1.3f), t);
          }
          for (const bool search : {false, true}) {
            ++turn;
            QuantizeParams p = {};
            p.n = 3;
            p.k = columns[turn % 7];
            p.weight_dtype = kDTypes[turn % 3];
            p.weight_stride = p.k + turn % 4;
            p.residual_dtype = kDTypes[turn / 3 % 3];
            p.codebook = codebook.data();
            p.bits = bits;
            p.group_size = group_size;
            p.scale_rule = rule;
            p.scale_search = search;
            p.scale_dtype = kDTypes[turn / 2 % 3];
            Guarded<char> weight((p.n * p.weight_stride) * size_of(p.weight_dtype));
            Guarded<char> low_rank(p.n * p.k * size_of(p.residual_dtype));
            fill(weight, p.weight_dtype, 0.02f, turn);
            fill(low_rank, p.residual_dtype, 0.005f, turn + 1);
            p.weight = weight.data();
            p.low_rank = turn % 5 == 0 ? nullptr : low_rank.data();
            check_parity(p);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_formats();
  return report();
}

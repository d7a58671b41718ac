// The CUDA quantize, dequantize and pack kernels, run on the CPU, against a scalar reading of quantize.h: equal bits.
#include <random>

#include "../cuda/dequantize.cu"
#include "../cuda/pack.cu"
#include "../cuda/quantize.cu"
#include "cuda_quantize_reference.h"
#include "harness.h"

namespace {

using namespace loftq;
using reference::Problem;

std::vector<float> make_codebook(const char* kind, int bits) {
  const int size = 1 << bits;
  std::vector<float> codebook(size);
  for (int i = 0; i < size; ++i) {
    const float t = -1.0f + 2.0f * i / (size - 1);
    if (!std::strcmp(kind, "integer")) codebook[i] = i - size / 2;
    if (!std::strcmp(kind, "linear")) codebook[i] = t;
    if (!std::strcmp(kind, "curved")) codebook[i] = std::copysign(std::pow(std::fabs(t), 1.4f), t);  // as NF tables are
  }
  return codebook;
}

// Rows in turn: Gaussian, zero, constant, tiny, huge, exact ties, outliers.
std::vector<float> make_weight(int64_t n, int64_t k, DType dtype, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> weight(n * k);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t column = 0; column < k; ++column) {
      const float x = normal(random);
      const float kinds[] = {0.02f * x,
                             0.0f,
                             seed % 2 ? -0.3f : 0.3f,
                             1e-30f * x,
                             1e30f * x,
                             0.25f * std::round(8.0f * x),
                             column % 37 == 5 ? 20.0f * x : 0.1f * x};
      weight[row * k + column] = reference::rounded(dtype, kinds[(row + seed) % 7]);
    }
  }
  return weight;
}

struct Layout {
  DType weight_dtype = DType::kFloat32;
  int64_t extra_stride = 0;
  size_t shift = 0;  // elements the weight is off its natural alignment
  bool fused = false;
  bool in_place = false;  // residual overwrites low_rank
  DType residual_dtype = DType::kFloat32;
};

void store(DType dtype, char* at, int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    std::memcpy(at + 4 * index, &value, 4);
  } else if (dtype == DType::kFloat16) {
    const _Float16 half = static_cast<_Float16>(value);
    std::memcpy(at + 2 * index, &half, 2);
  } else {
    std::memcpy(at + 2 * index, reinterpret_cast<char*>(&value) + 2, 2);  // the values are already rounded
  }
}

float load(DType dtype, const char* at, int64_t index) { return load_element(at, dtype, index); }

bool same_float(float a, float b) { return std::memcmp(&a, &b, 4) == 0 || (!std::isfinite(a) && !std::isfinite(b)); }

struct Buffers {
  Guarded<uint8_t> codes;
  Guarded<char> scale, offset, residual;
  Guarded<double> norm2;
  Buffers(const Problem& p, int64_t groups, DType residual_dtype)
      : codes(p.n * row_bytes(p.k, p.bits)),
        scale(p.n * groups * size_of(p.scale_dtype)),
        offset(p.n * groups * size_of(p.scale_dtype)),
        residual(p.n * p.k * size_of(residual_dtype)),
        norm2(p.n) {}
};

QuantizeParams make_params(const Problem& p, const Layout& layout, const void* weight, const void* low_rank,
                           Buffers& out) {
  QuantizeParams params = {};
  params.weight = weight;
  params.weight_dtype = layout.weight_dtype;
  params.weight_stride = p.k + layout.extra_stride;
  params.codebook = p.codebook.data();
  params.n = p.n;
  params.k = p.k;
  params.bits = p.bits;
  params.group_size = p.group_size;
  params.scale_rule = p.rule;
  params.scale_search = p.search;
  params.scale_dtype = p.scale_dtype;
  params.codes = out.codes.data();
  params.scale = out.scale.data();
  params.offset = p.rule == ScaleRule::kMinMax ? out.offset.data() : nullptr;
  params.low_rank = low_rank;
  params.residual_dtype = layout.residual_dtype;
  params.residual = layout.fused ? out.residual.data() : nullptr;
  params.residual_norm2 = layout.fused ? out.norm2.data() : nullptr;
  return params;
}

void check_result(const Problem& p, const Layout& layout, const reference::Result& want, Buffers& got) {
  const int64_t groups = num_groups(p.k, p.group_size), size = group_width(p.k, p.group_size);
  const std::vector<uint8_t> packed = reference::pack(want.codes, p.n, p.k, p.bits);
  const int64_t bytes = row_bytes(p.k, p.bits);
  for (int64_t row = 0; row < p.n; ++row) {
    bool finite_row = true;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t at = row * groups + group;
      const float scale = load(p.scale_dtype, got.scale.data(), at);
      CHECK(same_float(scale, want.scale[at]), "row %ld group %ld: %g, not %g", row, group, scale, want.scale[at]);
      finite_row &= std::isfinite(want.scale[at]);
      if (!std::isfinite(want.scale[at])) continue;
      if (!want.offset.empty()) {
        const float offset = load(p.scale_dtype, got.offset.data(), at);
        CHECK(same_float(offset, want.offset[at]), "row %ld group %ld: offset %g", row, group, offset);
      }
      for (int64_t k = group * size; k < std::min(p.k, (group + 1) * size); ++k) {
        const int code = load_code(got.codes.data() + row * bytes, k, p.bits);
        CHECK(code == want.codes[row * p.k + k], "row %ld column %ld: %d, not %d", row, k, code,
              want.codes[row * p.k + k]);
        if (!layout.fused) continue;
        const float residual = load(layout.residual_dtype, got.residual.data(), row * p.k + k);
        CHECK(residual == reference::rounded(layout.residual_dtype, want.residual[row * p.k + k]), "residual at %ld",
              k);
      }
    }
    if (!finite_row) continue;
    CHECK(std::memcmp(&got.codes[row * bytes], &packed[row * bytes], bytes) == 0, "bytes of row %ld", row);
    if (layout.fused) {
      CHECK(got.norm2[row] == want.norm2[row], "norm of row %ld: %g, not %g", row, got.norm2[row], want.norm2[row]);
    }
  }
}

void check_dequantize(const Problem& p, const reference::Result& want, Buffers& quantized, DType out_dtype) {
  Guarded<char> out(p.n * p.k * size_of(out_dtype));
  DequantizeParams params = {};
  params.codes = quantized.codes.data();
  params.scale = quantized.scale.data();
  params.offset = p.rule == ScaleRule::kMinMax ? quantized.offset.data() : nullptr;
  params.scale_dtype = p.scale_dtype;
  params.codebook = p.codebook.data();
  params.n = p.n;
  params.k = p.k;
  params.bits = p.bits;
  params.group_size = p.group_size;
  params.out = out.data();
  params.out_dtype = out_dtype;
  CHECK(launch_dequantize_cuda(params, nullptr) == cudaSuccess, "dequantize");
  for (int64_t i = 0; i < p.n * p.k; ++i) {
    const float want_out = reference::rounded(out_dtype, want.decoded[i]);
    if (!std::isfinite(want.decoded[i])) continue;
    CHECK(load(out_dtype, out.data(), i) == want_out, "element %ld: %g, not %g", i, load(out_dtype, out.data(), i),
          want_out);
  }
}

void check_problem(Problem p, const Layout& layout) {
  const int64_t groups = num_groups(p.k, p.group_size), stride = p.k + layout.extra_stride;
  const size_t element = size_of(layout.weight_dtype);
  Guarded<char> weight(((p.n - 1) * stride + p.k) * element, layout.shift * element);
  for (int64_t i = 0; i < p.n * p.k; ++i) {
    store(layout.weight_dtype, weight.data(), i / p.k * stride + i % p.k, p.weight[i]);
  }
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0.0f, 0.005f);
  if (layout.fused) {
    p.low_rank.resize(p.n * p.k);
    for (float& x : p.low_rank) x = reference::rounded(layout.residual_dtype, normal(random));
  }
  const reference::Result want = reference::quantize(p);

  for (const emulation::Order order : kOrders) {
    emulation::device.order = order;
    Buffers got(p, groups, layout.residual_dtype);
    Guarded<char> low_rank(p.low_rank.size() * size_of(layout.residual_dtype));
    char* low_rank_at = !layout.fused ? nullptr : layout.in_place ? got.residual.data() : low_rank.data();
    for (size_t i = 0; i < p.low_rank.size(); ++i) store(layout.residual_dtype, low_rank_at, i, p.low_rank[i]);
    const QuantizeParams params = make_params(p, layout, weight.data(), low_rank_at, got);
    CHECK(launch_quantize_cuda(params, nullptr) == cudaSuccess, "quantize");
    check_result(p, layout, want, got);
    if (order == emulation::Order::kForward) check_dequantize(p, want, got, static_cast<DType>(p.n % 3));
  }
}

struct Rule {
  ScaleRule rule;
  const char* codebook;
};
const Rule kRules[] = {{ScaleRule::kAbsmax, "curved"},
                       {ScaleRule::kAbsmax, "integer"},
                       {ScaleRule::kMinMax, "integer"},
                       {ScaleRule::kMeanStd, "linear"},
                       {ScaleRule::kMinMax, "linear"}};
const DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// Every format and option; shapes, types and layouts take turns so that each meets many of the formats.
void test_formats() {
  const int64_t columns[] = {1, 63, 64, 65, 100, 128, 132, 257, 300, 512, 1030};
  int turn = 0;
  for (const int bits : kCodeBits) {
    for (const Rule& rule : kRules) {
      for (const int64_t group_size : kGroupSizes) {
        for (const bool search : {false, true}) {
          Problem p;
          p.n = 1 + turn % 4;
          p.k = columns[turn % 11];
          p.bits = bits;
          p.group_size = group_size;
          p.rule = rule.rule;
          p.search = search;
          p.scale_dtype = kDTypes[turn / 2 % 3];
          p.codebook = make_codebook(rule.codebook, bits);
          Layout layout;
          layout.weight_dtype = kDTypes[turn % 3];
          layout.extra_stride = (turn % 5) * 2;
          layout.shift = turn % 7 == 0;
          layout.fused = turn % 2;
          layout.in_place = turn % 4 == 1;
          layout.residual_dtype = kDTypes[turn / 4 % 3];
          p.weight = make_weight(p.n, p.k, layout.weight_dtype, turn);
          check_problem(p, layout);
          ++turn;
        }
      }
    }
  }
}

// Every column count around the tile, span and warp boundaries; more columns than one pass of a block.
void test_shapes() {
  for (const int bits : kCodeBits) {
    for (const int64_t group_size : kGroupSizes) {
      for (const int64_t k : {1, 4, 31, 32, 33, 96, 127, 129, 192, 255, 256, 260, 1024, 1028, 2049}) {
        Problem p = {2,
                     k,
                     bits,
                     group_size,
                     ScaleRule::kAbsmax,
                     false,
                     DType::kFloat32,
                     make_codebook("curved", bits),
                     make_weight(2, k, DType::kFloat32, 7),
                     {}};
        Layout layout;
        layout.fused = true;
        check_problem(p, layout);
      }
    }
  }
}

// NaN and Inf make the scale of their group non-finite and leave the others alone; search rescues a scale that
// overflows its type where a smaller one does not.
void test_non_finite() {
  for (const Rule& rule : kRules) {
    for (const int64_t group_size : kGroupSizes) {
      for (const bool search : {false, true}) {
        Problem p = {4,
                     300,
                     4,
                     group_size,
                     rule.rule,
                     search,
                     DType::kFloat16,
                     make_codebook(rule.codebook, 4),
                     make_weight(4, 300, DType::kFloat32, 14),
                     {}};
        p.weight[5] = NAN;
        p.weight[300 + 299] = INFINITY;
        p.weight[600 + 64] = -INFINITY;
        p.weight[900 + 128] = 1e5f * p.codebook.back();
        check_problem(p, Layout());
      }
    }
  }
}

void test_bad_dequantize(const QuantizeParams& made) {
  Guarded<float> out(64);
  const DequantizeParams good = {made.codes, made.scale, nullptr,         made.scale_dtype, made.codebook,  made.n,
                                 made.k,     made.bits,  made.group_size, out.data(),       DType::kFloat32};
  const auto rejected = [&](auto change, cudaError_t want = cudaErrorInvalidValue) {
    DequantizeParams params = good;
    change(params);
    CHECK(launch_dequantize_cuda(params, nullptr) == want, "dequantize");
  };
  rejected([](DequantizeParams& q) { q.bits = 5; });
  rejected([](DequantizeParams& q) { q.k = -64; });
  rejected([](DequantizeParams& q) { q.k = INT64_MAX; });
  rejected([](DequantizeParams& q) { q.codes = nullptr; });
  rejected([](DequantizeParams& q) { q.codes += 1; });
  rejected([](DequantizeParams& q) { q.scale = nullptr; });
  rejected([](DequantizeParams& q) { q.codebook = nullptr; });
  rejected([](DequantizeParams& q) { q.out = nullptr; });
  rejected([](DequantizeParams& q) { q.scale_dtype = static_cast<DType>(1000); });
  rejected([](DequantizeParams& q) { q.out_dtype = static_cast<DType>(-1000); });
  rejected([](DequantizeParams& q) { q.n = 0, q.out = nullptr, q.codes += 1; }, cudaSuccess);
}

void test_bad_packing(const QuantizeParams& made) {
  uint8_t* const codes = made.codes;
  const auto refused = [](const auto& params, auto launch) {
    CHECK(launch(params, nullptr) == cudaErrorInvalidValue, "n %ld k %ld bits %d", params.n, params.k, params.bits);
  };
  for (const PackParams& p : {PackParams{nullptr, 1, 64, 4, codes}, PackParams{codes, 1, 64, 4, nullptr},
                              PackParams{codes, -1, 64, 4, codes}, PackParams{codes, 1, 64, 3, codes}}) {
    refused(p, launch_pack_cuda);
    refused(UnpackParams{p.codes, p.n, p.k, p.bits, p.packed}, launch_unpack_cuda);
  }
}

void test_bad_parameters() {
  Problem p = {1, 64, 4, 64, ScaleRule::kAbsmax, false, DType::kFloat32, make_codebook("linear", 4), {}, {}};
  Buffers out(p, 1, DType::kFloat32);
  Guarded<float> weight(64);
  const QuantizeParams good = make_params(p, Layout(), weight.data(), nullptr, out);
  const long before = emulation::device.launches;
  const auto rejected = [&](auto change, cudaError_t want = cudaErrorInvalidValue) {
    QuantizeParams params = good;
    change(params);
    CHECK(launch_quantize_cuda(params, nullptr) == want, "quantize");
  };
  rejected([](QuantizeParams& q) { q.bits = 3; });
  rejected([](QuantizeParams& q) { q.group_size = 48; });
  rejected([](QuantizeParams& q) { q.group_size = 0; });
  rejected([](QuantizeParams& q) { q.n = -1; });
  rejected([](QuantizeParams& q) { q.weight = nullptr; });
  rejected([](QuantizeParams& q) { q.scale_rule = ScaleRule::kMinMax; });  // offset missing
  rejected([](QuantizeParams& q) { q.codebook = nullptr; });
  rejected([](QuantizeParams& q) { q.codes = nullptr; });
  rejected([](QuantizeParams& q) { q.scale = nullptr; });
  rejected([](QuantizeParams& q) { q.offset = q.scale; });  // which kAbsmax has not
  rejected([](QuantizeParams& q) { q.scale_rule = static_cast<ScaleRule>(7); });
  rejected([](QuantizeParams& q) { q.weight_dtype = static_cast<DType>(-1); });
  rejected([](QuantizeParams& q) { q.scale_dtype = static_cast<DType>(3); });
  rejected([](QuantizeParams& q) { q.weight_stride = -64; });
  rejected([](QuantizeParams& q) { q.weight_stride = INT64_MAX; });
  rejected([](QuantizeParams& q) { q.n = INT64_MAX / 2; });
  rejected([](QuantizeParams& q) { q.residual_norm2 = reinterpret_cast<double*>(q.codes); });  // no residual
  rejected([](QuantizeParams& q) { q.residual = q.scale, q.residual_dtype = static_cast<DType>(3); });
  rejected([](QuantizeParams& q) { q.n = 0, q.codes = nullptr; }, cudaSuccess);
  rejected([](QuantizeParams& q) { q.k = 0; }, cudaSuccess);
  double norms[] = {-1, -1, -1};
  rejected([&](QuantizeParams& q) { q.k = 0, q.n = 2, q.residual_norm2 = norms; }, cudaSuccess);
  CHECK(norms[0] == 0 && norms[1] == 0 && norms[2] == -1, "norms of rows without columns: %g %g", norms[0], norms[1]);
  test_bad_dequantize(good);
  test_bad_packing(good);
  CHECK(emulation::device.launches == before, "nothing may be launched");
}

// A group size that quantize does not make is refused by quantize and dequantize alike, and nothing is launched.
void test_group_sizes() {
  Problem p = {2, 300, 4, 32, ScaleRule::kAbsmax, false, DType::kFloat32, make_codebook("linear", 4), {}, {}};
  p.weight = make_weight(p.n, p.k, DType::kFloat32, 3);
  Buffers buffers(p, num_groups(p.k, p.group_size), DType::kFloat32);
  Guarded<char> out(p.n * p.k * sizeof(float));
  QuantizeParams quantize = make_params(p, Layout(), p.weight.data(), nullptr, buffers);
  DequantizeParams dequantize = {
      buffers.codes.data(), buffers.scale.data(), nullptr,        p.scale_dtype, p.codebook.data(), p.n, p.k, p.bits,
      p.group_size,         out.data(),           DType::kFloat32};
  for (int64_t size = -2; size <= 520; ++size) {
    const cudaError_t want = is_group_size(size) ? cudaSuccess : cudaErrorInvalidValue;
    const long before = emulation::device.launches;
    quantize.group_size = dequantize.group_size = size;
    CHECK(launch_quantize_cuda(quantize, nullptr) == want, "quantize, group size %ld", size);
    CHECK(launch_dequantize_cuda(dequantize, nullptr) == want, "dequantize, group size %ld", size);
    CHECK(emulation::device.launches - before == (want == cudaSuccess ? 2 : 0), "launches, group size %ld", size);
  }
}

void test_pack() {
  std::mt19937 random(3);
  for (const int bits : kCodeBits) {
    for (const int64_t k : {1, 63, 64, 65, 200, 1300}) {
      const int64_t n = 3;
      Guarded<uint8_t> codes(n * k), packed(n * row_bytes(k, bits)), unpacked(n * k);
      std::vector<uint8_t> values(n * k);
      for (int64_t i = 0; i < n * k; ++i) codes[i] = values[i] = random() & ((1 << bits) - 1);
      CHECK(launch_pack_cuda({codes.data(), n, k, bits, packed.data()}, nullptr) == cudaSuccess, "pack");
      const std::vector<uint8_t> want = reference::pack(values, n, k, bits);
      CHECK(std::memcmp(packed.data(), want.data(), want.size()) == 0, "%d bits, k %ld", bits, k);
      CHECK(launch_unpack_cuda({packed.data(), n, k, bits, unpacked.data()}, nullptr) == cudaSuccess, "unpack");
      CHECK(unpacked.equals(codes), "%d bits, k %ld", bits, k);
    }
  }
}

}  // namespace

int main() {
  test_formats();
  test_shapes();
  test_non_finite();
  test_bad_parameters();
  test_group_sizes();
  test_pack();
  return report();
}

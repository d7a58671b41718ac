// The Jacobi kernel, run on the CPU, on matrices whose singular values are known by construction.
#include "../cuda/jacobi.cu"
#include "cuda_small_matrix_reference.h"
#include "harness.h"

namespace {

using namespace loftq;
using reference::Matrix;

template <typename T>
struct Solved {
  Guarded<T> values, u, v;
  Guarded<int> info;
  Solved(int batch, int m, int n, bool with_u)
      : values(batch * n), u(with_u ? batch * m * n : 0), v(batch * n * n), info(batch) {}
  bool equals(const Solved& other) const {
    return values.equals(other.values) && u.equals(other.u) && v.equals(other.v) && info.equals(other.info);
  }
};

template <typename T>
std::vector<T> concatenate(const std::vector<Matrix>& matrices) {
  std::vector<T> data;
  for (const Matrix& a : matrices) data.insert(data.end(), a.data.begin(), a.data.end());
  return data;
}

template <typename T>
JacobiParams<T> make_params(const T* a, int batch, int m, int n, bool symmetric, Solved<T>& out) {
  JacobiParams<T> params = {};
  params.a = a;
  params.batch = batch;
  params.m = m;
  params.n = n;
  params.symmetric = symmetric;
  params.values = out.values.data();
  params.u = symmetric ? nullptr : out.u.data();
  params.v = out.v.data();
  params.info = out.info.data();
  return params;
}

// Where the matrices live: the block's shared memory, or (those above 14 x 14 float32) the workspace.
const int kSharedBytes[] = {227 << 10, 2 << 10};

// Runs in both places and all orders of threads, which must agree, and hands every matrix's result to check(index,
// info, values, u, v).
template <typename T, typename Check>
void solve(const std::vector<Matrix>& matrices, bool symmetric, int max_sweeps, const Check& check) {
  const int batch = static_cast<int>(matrices.size()), m = matrices[0].rows, n = matrices[0].cols;
  const std::vector<T> data = concatenate<T>(matrices);
  Guarded<T> a(data.size());
  std::copy(data.begin(), data.end(), a.data());
  for (const int shared : kSharedBytes) {
    emulation::device.max_shared_bytes = std::max(shared, static_cast<int>(JacobiScratch<T>::bytes(n)));
    Solved<T> first(batch, m, n, !symmetric);
    for (const emulation::Order order : kOrders) {
      emulation::device.order = order;
      Solved<T> out(batch, m, n, !symmetric);
      Solved<T>& target = order == emulation::Order::kForward ? first : out;
      JacobiParams<T> params = make_params(a.data(), batch, m, n, symmetric, target);
      params.max_sweeps = max_sweeps;
      Guarded<char> workspace(jacobi_workspace_bytes(params));
      params.workspace = workspace.size() == 0 ? nullptr : workspace.data();
      CHECK(launch_jacobi_cuda(params, nullptr) == cudaSuccess, "%d x %d", m, n);
      if (&target == &out) CHECK(out.equals(first), "%d x %d: the result depends on the order of threads", m, n);
    }
    for (int i = 0; i < batch; ++i) {
      const Matrix u = symmetric ? Matrix(0, 0) : reference::from(&first.u[static_cast<size_t>(i) * m * n], m, n);
      check(i, first.info[i], reference::from(&first.values[static_cast<size_t>(i) * n], 1, n).data, u,
            reference::from(&first.v[static_cast<size_t>(i) * n * n], n, n));
    }
  }
  CHECK(std::memcmp(data.data(), a.data(), data.size() * sizeof(T)) == 0, "the input was changed");
}

template <typename T>
Matrix rounded_to(const Matrix& a) {
  Matrix result = a;
  for (double& x : result.data) x = static_cast<T>(x);
  return result;
}

template <typename T>
double eps() {
  return sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;
}

// What must hold of a decomposition of `a` with singular values `want` (descending).
template <typename T>
void check_decomposition(const char* name, const Matrix& a, const std::vector<double>& want, int info,
                         const std::vector<double>& values, const Matrix& u, const Matrix& v) {
  const int n = a.cols;
  const double top = *std::max_element(want.begin(), want.end()), error = 8.0 * std::sqrt(n) * eps<T>();
  CHECK(info == 0, "%s %d: info %d", name, n, info);
  CHECK(std::is_sorted(values.rbegin(), values.rend()), "%s %d", name, n);
  for (int i = 0; i < n; ++i) {
    CHECK(std::fabs(values[i] - want[i]) <= error * top, "%s %d: value %d is %g, not %g", name, n, i, values[i],
          want[i]);
  }
  CHECK(reference::orthogonality_error(v) <= error, "%s %d: %g", name, n, reference::orthogonality_error(v));
  const Matrix av = reference::product(a, v);
  const Matrix right = reference::scaled_columns(u.rows == 0 ? v : u, values);
  const double residual = reference::distance(av, right);
  CHECK(residual <= error * top, "%s %d: |A V - U S| = %g", name, n, residual);
  if (u.rows == 0) return;
  for (int i = 0; i < n; ++i) {  // u_i orthonormal as far as values are not zero
    for (int j = 0; j <= i && values[i] > 0; ++j) {
      double dot = i == j ? -1.0 : 0.0;
      for (int k = 0; k < u.rows; ++k) dot += u(k, i) * u(k, j);
      CHECK(std::fabs(dot) <= 4 * error, "%s %d: u%d . u%d = %g", name, n, i, j, dot);
    }
  }
}

struct Spectrum {
  const char* name;
  double (*value)(int i, int n);
};
const Spectrum kSpectra[] = {
    {"gap 1.001", [](int i, int) { return std::pow(1.001, -i); }},
    {"flat", [](int, int) { return 2.5; }},
    {"steep", [](int i, int n) { return std::pow(10.0, -6.0 * i / n); }},
    {"clusters", [](int i, int n) { return i < n / 3   ? 1.0
                                           : i < n / 2 ? 0.999
                                                       : 1e-3; }},
    {"rank half", [](int i, int n) { return i < (n + 1) / 2 ? 1.0 + 1.0 / (i + 1) : 0.0; }},
    {"rank one", [](int i, int) { return i == 0 ? 3.0 : 0.0; }},
};

template <typename T>
void test_spectra(const std::vector<int>& sizes, bool symmetric, const std::vector<int>& spectra = {0, 1, 2, 3, 4, 5}) {
  for (const int n : sizes) {
    if (kSanitized && n > 16) continue;
    std::vector<Matrix> matrices;
    std::vector<std::vector<double>> values;
    for (const int which : spectra) {
      const Spectrum& spectrum = kSpectra[which];
      std::vector<double> value(n);
      for (int i = 0; i < n; ++i) value[i] = spectrum.value(i, n);
      matrices.push_back(rounded_to<T>(reference::with_values(symmetric ? 0 : n + n / 2 + 1, value, 31 * n)));
      std::sort(value.rbegin(), value.rend());
      values.push_back(value);
    }
    solve<T>(matrices, symmetric, 0,
             [&](int i, int info, const std::vector<double>& got, const Matrix& u, const Matrix& v) {
               check_decomposition<T>(kSpectra[spectra[i]].name, matrices[i], values[i], info, got, u, v);
             });
  }
}

// Zero, identity, diagonal, and one with a NaN and one with an Inf between good ones, which must stay good.
template <typename T>
void test_special() {
  const int n = 7;
  std::vector<Matrix> matrices(6, Matrix(n, n));
  std::vector<std::vector<double>> values(6, std::vector<double>(n, 0.0));
  for (int i = 0; i < n; ++i) {
    matrices[1](i, i) = values[1][i] = 1.0;
    matrices[3](i, i) = i;
    values[3][i] = n - 1 - i;
    matrices[5](i, i) = values[5][i] = 4.0;
  }
  matrices[2](3, 4) = NAN;
  matrices[4](6, 6) = INFINITY;
  solve<T>(matrices, true, 0, [&](int i, int info, const std::vector<double>& got, const Matrix& u, const Matrix& v) {
    if (i != 2 && i != 4) return check_decomposition<T>("special", matrices[i], values[i], info, got, u, v);
    CHECK(info == -1 && std::isnan(got[0]) && std::isnan(v.data[0]), "matrix %d: info %d", i, info);
  });
}

// Entries near the ends of float32's range: squares of the scaled matrix neither overflow nor vanish.
void test_range() {
  for (const double scale : {1e-42, 1e-30, 1e30}) {
    std::vector<double> values = {4.0 * scale, 2.0 * scale, 1.0 * scale, 0.5 * scale};
    const std::vector<Matrix> matrices = {rounded_to<float>(reference::with_values(6, values, 3))};
    solve<float>(matrices, false, 0,
                 [&](int, int info, const std::vector<double>& got, const Matrix&, const Matrix& v) {
                   CHECK(info == 0 && reference::orthogonality_error(v) < 1e-5, "scale %g: info %d", scale, info);
                   const double error = std::max(1e-5, 1e-44 / scale);  // denormals hold few bits
                   for (int i = 0; i < 4; ++i)
                     CHECK(std::fabs(got[i] / values[i] - 1.0) < error, "%g, not %g", got[i], values[i]);
                 });
  }
}

// Columns of very different lengths, some of which underflow when squared, must not keep it from ending.
void test_graded() {
  const int n = 12;
  std::vector<double> factor(n);
  for (int i = 0; i < n; ++i) factor[i] = std::pow(10.0, -2.5 * i);
  const std::vector<Matrix> matrices = {rounded_to<float>(scaled_columns(reference::random_normal(20, n, 9), factor))};
  solve<float>(matrices, false, 0,
               [&](int, int info, const std::vector<double>& got, const Matrix& u, const Matrix& v) {
                 CHECK(info == 0 && std::isfinite(got[0]) && reference::orthogonality_error(v) < 1e-5, "info %d", info);
                 CHECK(reference::distance(matrices[0], product(scaled_columns(u, got), transposed(v))) < 1e-5 * got[0],
                       "residual");
               });
}

void test_too_few_sweeps() {
  const std::vector<Matrix> matrices = {reference::random_normal(24, 24, 5)};
  solve<double>(matrices, false, 1, [&](int, int info, const std::vector<double>&, const Matrix&, const Matrix& v) {
    CHECK(info == 1, "info %d", info);
    CHECK(reference::orthogonality_error(v) < 1e-13, "the last iterate is a rotation nonetheless");
  });
}

void test_bad_parameters() {
  emulation::device.max_shared_bytes = 4 << 10;
  Solved<float> out(1, 64, 64, true);
  Guarded<float> a(64 * 64);
  const JacobiParams<float> good = make_params(a.data(), 1, 64, 64, false, out);
  CHECK(jacobi_workspace_bytes(good) == 64 * 128 * sizeof(float), "%zu", jacobi_workspace_bytes(good));
  const auto rejected = [&](auto change, cudaError_t want = cudaErrorInvalidValue) {
    JacobiParams<float> params = good;
    change(params);
    CHECK(launch_jacobi_cuda(params, nullptr) == want, "jacobi");
  };
  rejected([](JacobiParams<float>&) {});  // the workspace is missing
  rejected([](JacobiParams<float>& p) { p.m = 63; });
  rejected([](JacobiParams<float>& p) { p.symmetric = true; });  // with u
  rejected([](JacobiParams<float>& p) { p.a = nullptr; });
  Guarded<char> workspace(jacobi_workspace_bytes(good));
  const auto spoiled = [&](auto change) {
    rejected([&](JacobiParams<float>& p) { p.workspace = workspace.data(), change(p); });
  };
  spoiled([](JacobiParams<float>& p) { p.values = nullptr; });
  spoiled([](JacobiParams<float>& p) { p.v = nullptr; });
  spoiled([](JacobiParams<float>& p) { p.info = nullptr; });
  spoiled([](JacobiParams<float>& p) { p.batch = -1; });
  spoiled([](JacobiParams<float>& p) { p.batch = INT64_MAX; });
  spoiled([](JacobiParams<float>& p) { p.max_sweeps = -1; });
  rejected([](JacobiParams<float>& p) { p.batch = 0; }, cudaSuccess);
  rejected([](JacobiParams<float>& p) { p.n = p.m = 0; }, cudaSuccess);
}

}  // namespace

// Without arguments the whole test; with a number n just one n x n matrix, which may be large (384: about a minute).
int main(int argc, char** argv) {
  if (argc > 1) {
    test_spectra<float>({std::atoi(argv[1])}, true, {0});
    return report();
  }
  test_spectra<float>({1, 2, 3, 16, 33}, true);
  test_spectra<double>({1, 5, 24}, true);
  test_spectra<float>({1, 2, 5, 24}, false);
  test_spectra<double>({3, 17}, false);
  test_spectra<float>({72}, true, {0});
  test_special<float>();
  test_special<double>();
  test_range();
  test_graded();
  test_too_few_sweeps();
  test_bad_parameters();
  return report();
}

// The Cholesky kernel, run on the CPU: R^T R = G, Q = Y R^-1 orthonormal, and what happens where G is not definite.
#include "../cuda/cholesky.cu"
#include "cuda_small_matrix_reference.h"
#include "harness.h"

namespace {

using namespace loftq;
using reference::Matrix;

template <typename T>
Matrix gram_of(const Matrix& y) {  // as float32 or float64 arithmetic would round it
  Matrix gram = product(transposed(y), y);
  for (double& x : gram.data) x = static_cast<T>(x);
  return gram;
}

struct Factors {
  int info;
  Matrix r, r_inverse;
};

// Runs in all orders of threads, which must agree.
template <typename T>
std::vector<Factors> factor(const std::vector<Matrix>& grams, double epsilon = 0.0) {
  const int batch = static_cast<int>(grams.size()), b = grams[0].rows;
  const size_t entries = static_cast<size_t>(b) * b;
  Guarded<T> gram(batch * entries);
  Guarded<double> r(batch * entries), first_r(batch * entries);
  Guarded<float> r_inverse(batch * entries), first_inverse(batch * entries);
  Guarded<int> info(batch);
  for (int i = 0; i < batch; ++i) {
    for (size_t j = 0; j < entries; ++j) {
      const bool upper = j % b > j / b;  // never read
      gram[i * entries + j] = upper ? static_cast<T>(NAN) : static_cast<T>(grams[i].data[j]);
    }
  }
  for (const emulation::Order order : kOrders) {
    emulation::device.order = order;
    CholeskyParams<T> params = {gram.data(), batch, b, epsilon, r_inverse.data(), r.data(), info.data()};
    CHECK(launch_cholesky_cuda(params, nullptr) == cudaSuccess, "b %d", b);
    if (order == emulation::Order::kForward) {
      std::copy(r.data(), r.data() + r.size(), first_r.data());
      std::copy(r_inverse.data(), r_inverse.data() + r_inverse.size(), first_inverse.data());
    }
    CHECK(r.equals(first_r) && r_inverse.equals(first_inverse), "b %d: depends on the order of threads", b);
    params.r = nullptr;
    CHECK(launch_cholesky_cuda(params, nullptr) == cudaSuccess && r_inverse.equals(first_inverse), "without r");
  }
  std::vector<Factors> result;
  for (int i = 0; i < batch; ++i) {
    result.push_back({info[i], reference::from(&r[i * entries], b, b), reference::from(&r_inverse[i * entries], b, b)});
  }
  return result;
}

void check_triangular(const Factors& f) {
  for (int i = 0; i < f.r.rows; ++i) {
    for (int j = 0; j < i; ++j) CHECK(f.r(i, j) == 0.0 && f.r_inverse(i, j) == 0.0, "below the diagonal: %d %d", i, j);
  }
}

template <typename T>
void test_well_conditioned() {
  for (const int b : {1, 2, 3, 31, 32, 33, 72, 136}) {
    std::vector<Matrix> ys, grams;
    for (int i = 0; i < 3; ++i) {
      ys.push_back(reference::random_normal(3 * b + 5, b, 100 * b + i));
      grams.push_back(gram_of<T>(ys[i]));
    }
    const std::vector<Factors> factors = factor<T>(grams);
    for (int i = 0; i < 3; ++i) {
      const Factors& f = factors[i];
      check_triangular(f);
      CHECK(f.info == 0, "b %d: info %d", b, f.info);
      const double error = reference::distance(product(transposed(f.r), f.r), grams[i]) / reference::largest(grams[i]);
      CHECK(error < 1e-14, "b %d: |R^T R - G| = %g", b, error);
      Matrix unit = product(f.r, f.r_inverse);
      for (int j = 0; j < b; ++j) unit(j, j) -= 1.0;
      CHECK(reference::largest(unit) < 1e-6, "b %d: |R R^-1 - 1| = %g", b, reference::largest(unit));
      CHECK(reference::orthogonality_error(product(ys[i], f.r_inverse)) < 5e-6, "b %d", b);
    }
  }
}

double log_uniform(int i, int n, double condition) { return std::pow(condition, -static_cast<double>(i) / (n - 1)); }

// Y with condition 1e4. Float64 Gram: CholeskyQR2 suffices. Float32 Gram: cond^2 is beyond its precision, the shift
// steps in, and repeating until info is 0 (shifted CholeskyQR3) still ends with an orthonormal basis of the same space.
template <typename T>
void test_ill_conditioned(int want_passes) {
  const int b = 40;
  std::vector<double> values(b);
  for (int i = 0; i < b; ++i) values[i] = log_uniform(i, b, 1e4);
  const Matrix y = reference::with_values(150, values, 17);
  Matrix q = y;
  int passes = 0, info = 1;
  for (; passes < 5 && (info > 0 || reference::orthogonality_error(q) > 2e-6); ++passes) {
    const Factors f = factor<T>({gram_of<T>(q)})[0];
    CHECK(f.info >= 0, "info %d", f.info);
    info = f.info;
    q = product(q, f.r_inverse);
  }
  CHECK(passes <= want_passes, "%d passes", passes);
  CHECK(reference::orthogonality_error(q) <= 2e-6, "%g", reference::orthogonality_error(q));
  const double outside = reference::distance(y, product(q, product(transposed(q), y)));
  CHECK(outside < 1e-5, "Y leaves the span of Q by %g", outside);
}

// Columns of lengths 1e-12 .. 1e12 but good angles: scaling makes it as easy as any.
void test_graded_columns() {
  const int b = 24;
  Matrix y = reference::random_normal(100, b, 4);
  for (int j = 0; j < b; ++j) {
    for (int i = 0; i < y.rows; ++i) y(i, j) *= std::pow(10.0, j - 12);
  }
  const Factors f = factor<float>({gram_of<float>(y)})[0];
  CHECK(f.info == 0, "info %d", f.info);
  CHECK(reference::orthogonality_error(product(y, f.r_inverse)) < 5e-6, "not orthonormal");
}

template <typename T>
void test_semi_definite() {
  const int b = 16;
  Matrix low_rank = product(reference::random_normal(60, 5, 1), reference::random_normal(5, b, 2));
  Matrix with_zero = reference::random_normal(60, b, 3);
  for (int i = 0; i < 60; ++i) with_zero(i, 4) = 0.0;
  Matrix equal_columns = reference::random_normal(60, b, 5);
  for (int i = 0; i < 60; ++i) equal_columns(i, 9) = equal_columns(i, 2);
  const Matrix zero(60, b);
  Matrix with_nan = gram_of<T>(with_zero), indefinite = gram_of<T>(equal_columns);
  with_nan(7, 3) = NAN;
  indefinite(6, 1) = 1e30;  // no column norms allow it
  const std::vector<Factors> f = factor<T>({gram_of<T>(low_rank), gram_of<T>(with_zero), gram_of<T>(equal_columns),
                                            gram_of<T>(zero), with_nan, indefinite, gram_of<T>(with_zero)});
  const int want_sign[] = {1, 1, 1, 1, -1, -1, 1};
  for (int i = 0; i < 7; ++i) {
    CHECK((f[i].info > 0) == (want_sign[i] > 0), "matrix %d: info %d", i, f[i].info);
    const bool finite = std::isfinite(reference::largest(f[i].r_inverse)) && std::isfinite(reference::largest(f[i].r));
    CHECK(finite == (want_sign[i] > 0), "matrix %d", i);
  }
  CHECK(f[4].info == -1 && f[5].info == -2, "info %d %d", f[4].info, f[5].info);
  CHECK(f[1].info == 1 && reference::largest(f[3].r_inverse) == 0.0, "zero columns");
  Matrix q = product(with_zero, f[1].r_inverse);
  for (int i = 0; i < 60; ++i) {
    CHECK(q(i, 4) == 0.0, "a zero column stays zero");
    q(i, 4) = i == 0;
  }
  Matrix gram = product(transposed(q), q);
  for (int i = 0; i < b; ++i) {
    for (int j = 0; j < b; ++j) {
      CHECK(i == 4 || j == 4 || std::fabs(gram(i, j) - (i == j)) < 5e-6, "the other columns are orthonormal");
    }
  }
  CHECK(reference::orthogonality_error(product(low_rank, f[0].r_inverse)) < 1.01, "no column of Q is longer than 1");
}

void test_bad_parameters() {
  Guarded<float> matrix(4);
  Guarded<int> info(1);
  const CholeskyParams<float> good = {matrix.data(), 1, 2, 0.0, matrix.data(), nullptr, info.data()};
  const auto rejected = [&](auto change, cudaError_t want = cudaErrorInvalidValue) {
    CholeskyParams<float> params = good;
    change(params);
    CHECK(launch_cholesky_cuda(params, nullptr) == want, "cholesky");
  };
  emulation::device.max_shared_bytes = 99 << 10;
  CHECK(cholesky_max_size() == 155, "%d", cholesky_max_size());
  rejected([](CholeskyParams<float>& p) { p.b = 156; });
  emulation::device.max_shared_bytes = 227 << 10;
  CHECK(cholesky_max_size() == 237, "%d", cholesky_max_size());
  rejected([](CholeskyParams<float>& p) { p.gram = nullptr; });
  rejected([](CholeskyParams<float>& p) { p.epsilon = NAN; });
  rejected([](CholeskyParams<float>& p) { p.r_inverse = nullptr; });
  rejected([](CholeskyParams<float>& p) { p.info = nullptr; });
  rejected([](CholeskyParams<float>& p) { p.b = -1; });
  rejected([](CholeskyParams<float>& p) { p.batch = -1; });
  rejected([](CholeskyParams<float>& p) { p.batch = INT64_MAX; });
  rejected([](CholeskyParams<float>& p) { p.batch = 0; }, cudaSuccess);
}

}  // namespace

int main() {
  test_well_conditioned<float>();
  test_well_conditioned<double>();
  test_ill_conditioned<double>(2);
  test_ill_conditioned<float>(4);
  test_graded_columns();
  test_semi_definite<float>();
  test_semi_definite<double>();
  test_bad_parameters();
  return report();
}

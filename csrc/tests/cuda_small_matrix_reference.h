// Dense float64 algebra for the tests of small matrices: constructions with a known decomposition, and residuals.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace reference {

struct Matrix {  // row-major
  int rows, cols;
  std::vector<double> data;
  Matrix(int rows_, int cols_) : rows(rows_), cols(cols_), data(static_cast<size_t>(rows_) * cols_, 0.0) {}
  double& operator()(int i, int j) { return data[static_cast<size_t>(i) * cols + j]; }
  double operator()(int i, int j) const { return data[static_cast<size_t>(i) * cols + j]; }
};

template <typename T>
Matrix from(const T* data, int rows, int cols) {
  Matrix a(rows, cols);
  for (size_t i = 0; i < a.data.size(); ++i) a.data[i] = static_cast<double>(data[i]);
  return a;
}

inline Matrix transposed(const Matrix& a) {
  Matrix t(a.cols, a.rows);
  for (int i = 0; i < a.rows; ++i) {
    for (int j = 0; j < a.cols; ++j) t(j, i) = a(i, j);
  }
  return t;
}

inline Matrix product(const Matrix& a, const Matrix& b) {
  Matrix c(a.rows, b.cols);
  for (int i = 0; i < a.rows; ++i) {
    for (int k = 0; k < a.cols; ++k) {
      for (int j = 0; j < b.cols; ++j) c(i, j) += a(i, k) * b(k, j);
    }
  }
  return c;
}

inline Matrix scaled_columns(Matrix a, const std::vector<double>& factor) {
  for (int i = 0; i < a.rows; ++i) {
    for (int j = 0; j < a.cols; ++j) a(i, j) *= factor[j];
  }
  return a;
}

inline double largest(const Matrix& a) {
  double result = 0.0;
  for (const double x : a.data) result = std::isnan(x) ? INFINITY : std::max(result, std::fabs(x));
  return result;
}

inline double distance(const Matrix& a, const Matrix& b) {
  Matrix difference = a;
  for (size_t i = 0; i < a.data.size(); ++i) difference.data[i] -= b.data[i];
  return largest(difference);
}

// max |(A^T A - 1)_ij|
inline double orthogonality_error(const Matrix& a) {
  Matrix gram = product(transposed(a), a);
  for (int i = 0; i < gram.rows; ++i) gram(i, i) -= 1.0;
  return largest(gram);
}

inline Matrix random_normal(int rows, int cols, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Matrix a(rows, cols);
  for (double& x : a.data) x = normal(random);
  return a;
}

// Orthonormal columns: Gram-Schmidt, twice.
inline Matrix random_orthonormal(int rows, int cols, unsigned seed) {
  Matrix t = transposed(random_normal(rows, cols, seed));  // rows of t are the columns
  for (int j = 0; j < cols; ++j) {
    for (int pass = 0; pass < 2; ++pass) {
      for (int i = 0; i < j; ++i) {
        double dot = 0.0;
        for (int k = 0; k < rows; ++k) dot += t(i, k) * t(j, k);
        for (int k = 0; k < rows; ++k) t(j, k) -= dot * t(i, k);
      }
    }
    double norm = 0.0;
    for (int k = 0; k < rows; ++k) norm += t(j, k) * t(j, k);
    for (int k = 0; k < rows; ++k) t(j, k) /= std::sqrt(norm);
  }
  return transposed(t);
}

// U diag(values) V^T, or V diag(values) V^T for m == 0, with random U [m, n], V [n, n].
inline Matrix with_values(int m, const std::vector<double>& values, unsigned seed) {
  const int n = static_cast<int>(values.size());
  const Matrix v = random_orthonormal(n, n, seed);
  const Matrix left = m == 0 ? v : random_orthonormal(m, n, seed + 1);
  return product(scaled_columns(left, values), transposed(v));
}

}  // namespace reference

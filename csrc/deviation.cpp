// Mean distances of groups of embeddings, on the CPU. Specs: ddpo/reference.py::mean_distance.
//
//   mean_cosine     d_i = (n - e_i . s) / (n - 1), e_i = x_i / |x_i|, s the sum of a group's e: x is read twice, a small
//                   group's from cache the second time
//   add_distances   one block of pairs, a by b: |x - y| = (|x|^2 + |y|^2 - 2 x . y)^1/2 summed by row and by column.
//                   Where that is small beside the lengths it comes from, the difference's own squares.
//
// Sums are float64, over blocks of a fixed size in a fixed order: the same bits for any number of threads.
//
// Letters: n rows, D width, R groups.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <vector>

namespace ddpo {
namespace {

constexpr int64_t kBlockRows = 2048;   // of a large group: one float64 sum each
constexpr int64_t kGrain = 1 << 15;    // elements that are worth a thread
constexpr double kSmall = 1e-3;        // of |x|^2 + |y|^2: below it their difference is computed anew

// A row as float or double: its own memory, or half types converted.
template <typename T>
struct Rows {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const T* data;
  int64_t stride, D;
  const Real* operator()(int64_t i, std::vector<Real>& room) const {
    if constexpr (std::is_same_v<T, Real>) {
      return data + i * stride;
    } else {
      room.resize(D);
      at::vec::convert(data + i * stride, room.data(), D);
      return room.data();
    }
  }
};

// Sixteen sums side by side: one alone would wait for each addition.
template <typename A, typename B>
double dot(const A* x, const B* y, int64_t D) {
  constexpr int64_t kLanes = 16;
  double lanes[kLanes] = {}, sum = 0;
  int64_t k = 0;
  for (; k + kLanes <= D; k += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += double(x[k + l]) * double(y[k + l]);
  }
  for (; k < D; ++k) sum += double(x[k]) * double(y[k]);
  for (double lane : lanes) sum += lane;
  return sum;
}

template <typename T>
void add_scaled(double* sum, const T* x, double scale, int64_t D) {
#pragma omp simd
  for (int64_t k = 0; k < D; ++k) sum[k] += double(x[k]) * scale;
}

template <typename T>
double squared_difference(const T* x, const T* y, int64_t D) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < D; ++k) {
    const double apart = double(x[k]) - double(y[k]);
    sum += apart * apart;
  }
  return sum;
}

template <typename T>
T squared_of(T value, T both, bool is_squared) {
  return is_squared ? value : both - 2 * value;
}

// roots of a block's row; returns how many are too small to be believed
template <typename T>
int64_t roots(T* root, const T* row, T own, const T* others, int64_t from, int64_t b, bool is_squared) {
  int64_t num_small = 0;
#pragma omp simd reduction(+ : num_small)
  for (int64_t j = from; j < b; ++j) {
    const T both = own + others[j], squared = squared_of(row[j], both, is_squared);
    num_small += squared < T(kSmall) * both;
    root[j] = std::sqrt(squared > 0 ? squared : T(0));
  }
  return num_small;
}

template <typename T>
double add_roots(double* column, const T* root, int64_t from, int64_t b) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = from; j < b; ++j) {
    sum += double(root[j]);
    column[j] += double(root[j]);
  }
  return sum;
}

void keep_lowest(std::atomic<int64_t>& lowest, int64_t i) {
  int64_t seen = lowest.load();
  while (i < seen && !lowest.compare_exchange_weak(seen, i)) {
  }
}

// x (n, D), rows of unit stride; groups (R+1,) int64 -> d (n,): float64 of float64, else float32
at::Tensor mean_cosine(const at::Tensor& x_in, const at::Tensor& groups_in) {
  TORCH_CHECK_VALUE(x_in.dim() == 2 && groups_in.dim() == 1 && groups_in.scalar_type() == at::kLong,
                    "mean_cosine: wanted (n, D) and int64 (R+1,), got ", x_in.sizes(), " and ", groups_in.sizes());
  const at::Tensor x = x_in.size(1) == 1 || x_in.stride(1) == 1 ? x_in : x_in.contiguous();
  const at::Tensor groups = groups_in.contiguous();
  const int64_t n = x.size(0), D = x.size(1), R = groups.size(0) - 1, *start = groups.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(R >= 0 && start[0] == 0 && start[R] == n, "mean_cosine: groups must run from 0 to ", n);
  at::Tensor d = at::empty({n}, x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
  std::atomic<int64_t> not_finite{n}, zero{n};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "mean_cosine", [&] {
    using Real = typename Rows<scalar_t>::Real;
    const Rows<scalar_t> rows{x.const_data_ptr<scalar_t>(), x.stride(0), D};
    Real* out = d.mutable_data_ptr<Real>();

    // adds the unit vectors of [begin, end) to s; keeps 1 / |x| in inverse (end - begin,)
    auto add_units = [&](int64_t begin, int64_t end, double* s, double* inverse, std::vector<Real>& room) {
      for (int64_t i = begin; i < end; ++i) {
        const Real* row = rows(i, room);
        const double squares = dot(row, row, D);
        if (!std::isfinite(squares)) keep_lowest(not_finite, i);
        if (squares == 0) keep_lowest(zero, i);
        const double scale = 1 / std::sqrt(squares);
        inverse[i - begin] = scale;
        add_scaled(s, row, scale, D);
      }
    };
    auto finish = [&](int64_t begin, int64_t end, int64_t size, const double* s, const double* inverse,
                      std::vector<Real>& room) {
      for (int64_t i = begin; i < end; ++i) {
        const double along = dot(rows(i, room), s, D) * inverse[i - begin];
        out[i] = size == 1 ? Real(0) : Real(std::max(0.0, (double(size) - along) / double(size - 1)));
      }
    };

    const int64_t mean_rows = std::max<int64_t>(1, n / std::max<int64_t>(1, R));
    const int64_t few = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, mean_rows * D));
    at::parallel_for(0, R, few, [&](int64_t first, int64_t last) {
      std::vector<Real> room;
      std::vector<double> s(D), inverse(kBlockRows);
      for (int64_t g = first; g < last; ++g) {
        const int64_t begin = start[g], end = start[g + 1];
        if (end - begin > kBlockRows) continue;
        std::fill(s.begin(), s.end(), 0.0);
        add_units(begin, end, s.data(), inverse.data(), room);
        finish(begin, end, end - begin, s.data(), inverse.data(), room);
      }
    });
    for (int64_t g = 0; g < R; ++g) {
      const int64_t begin = start[g], end = start[g + 1], blocks = (end - begin + kBlockRows - 1) / kBlockRows;
      if (end - begin <= kBlockRows) continue;
      std::vector<double> parts(blocks * D), inverse(end - begin);
      at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
        std::vector<Real> room;
        for (int64_t b = first; b < last; ++b) {
          const int64_t from = begin + b * kBlockRows;
          add_units(from, std::min(end, from + kBlockRows), parts.data() + b * D, inverse.data() + (from - begin), room);
        }
      });
      for (int64_t b = 1; b < blocks; ++b) {
        for (int64_t k = 0; k < D; ++k) parts[k] += parts[b * D + k];
      }
      at::parallel_for(begin, end, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, D)),
                       [&](int64_t first, int64_t last) {
                         std::vector<Real> room;
                         finish(first, last, end - begin, parts.data(), inverse.data() + (first - begin), room);
                       });
    }
  });
  TORCH_CHECK_VALUE(not_finite == n, "embeddings must be finite, row ", not_finite.load(), " is not");
  TORCH_CHECK_VALUE(zero == n, "cosine distance of a zero vector is not defined, row ", zero.load());
  return d;
}

// block (a, b): products of the rows x (a, D) and y (b, D), or their squared distances; their sums of squares (a,), (b,).
// Adds to by_row (a,) and by_column (b,), float64. same: x and y are the same rows, and each pair is taken once.
void add_distances(const at::Tensor& block, const at::Tensor& x, const at::Tensor& y, const at::Tensor& x_squares,
                   const at::Tensor& y_squares, at::Tensor by_row, at::Tensor by_column, bool same, bool is_squared) {
  const int64_t a = block.size(0), b = block.size(1), D = x.size(1);
  for (const at::Tensor& t : {block, x, y, x_squares, y_squares}) {
    TORCH_CHECK_VALUE(t.is_contiguous() && t.dtype() == block.dtype(), "add_distances: wanted one dtype, contiguous");
  }
  TORCH_CHECK_VALUE(x.size(0) == a && y.size(0) == b && y.size(1) == D && x_squares.numel() == a &&
                        y_squares.numel() == b && by_row.numel() == a && by_column.numel() == b &&
                        by_row.scalar_type() == at::kDouble && by_column.scalar_type() == at::kDouble &&
                        by_row.is_contiguous() && by_column.is_contiguous(),
                    "add_distances: shapes do not agree with ", block.sizes());
  constexpr int64_t kRows = 64;  // of a part: its sums by column are added in order
  const int64_t parts = (a + kRows - 1) / kRows;
  std::vector<double> columns(parts * b);
  AT_DISPATCH_FLOATING_TYPES(block.scalar_type(), "add_distances", [&] {
    const scalar_t *all = block.const_data_ptr<scalar_t>(), *xs = x.const_data_ptr<scalar_t>();
    const scalar_t *ys = y.const_data_ptr<scalar_t>(), *xx = x_squares.const_data_ptr<scalar_t>();
    const scalar_t* yy = y_squares.const_data_ptr<scalar_t>();
    double *row_sums = by_row.mutable_data_ptr<double>(), *column_sums = by_column.mutable_data_ptr<double>();
    at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      std::vector<scalar_t> root(b);
      for (int64_t part = first; part < last; ++part) {
        double* column = columns.data() + part * b;
        for (int64_t i = part * kRows; i < std::min(a, (part + 1) * kRows); ++i) {
          const int64_t from = same ? i + 1 : 0;
          const scalar_t* row = all + i * b;
          int64_t num_small = roots(root.data(), row, xx[i], yy, from, b, is_squared);
          for (int64_t j = from; num_small && j < b; ++j) {
            const scalar_t both = xx[i] + yy[j];
            if (!(squared_of(row[j], both, is_squared) < scalar_t(kSmall) * both)) continue;
            root[j] = scalar_t(std::sqrt(squared_difference(xs + i * D, ys + j * D, D)));
            --num_small;
          }
          row_sums[i] += add_roots(column, root.data(), from, b);
        }
      }
    });
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t j = 0; j < b; ++j) column_sums[j] += columns[part * b + j];
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(ddpo, CPU, m) {
  m.impl("mean_cosine", mean_cosine);
  m.impl("add_distances", add_distances);
}

}  // namespace ddpo

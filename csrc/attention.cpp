// Causal attention within each sequence of a packed batch, on the CPU. Spec: ddpo/reference.py::packed_attention.
//
//   s[i,j] = scale * q[i].k[j], capped: softcap * tanh(s / softcap);   j visible to i where 0 <= i - j < window
//   p[i,j] = exp(s[i,j] - lse[i]);   out[i] = sum_j p[i,j] v[j]
//   ds = p (do.v - delta), times 1 - (s/softcap)^2, with delta[i] = do[i].out[i]
//   dq = scale ds k, dk = scale ds^T q, dv = p^T do
//
// A block of query positions, with all the heads that share a key head below one another as rows of one matrix, meets
// the keys that it sees in blocks, from first to last: online softmax forward, recomputed probabilities backward. So
// the sums over a group's heads are part of the products, and no more than a block of scores is held. Keys behind the
// diagonal or before the window are never multiplied but for the corners of a block.
//
// A thread takes the next task, the longest first; tasks write apart from one another and add in a fixed order, so the
// bits do not depend on who ran what.
//
// Letters: T tokens, S sequences, H query heads, Hkv key heads, G = H / Hkv, d width of a head, dv that of its values,
// M = G * n rows of a block of n positions, B keys of a block.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace ddpo {
namespace {

constexpr int64_t kRows = 96;            // of a block of queries, the heads of a group together; measured, as kKeys
constexpr int64_t kLeastPositions = 16;  // of a block of queries: few rows make slow products
constexpr int64_t kKeys = 256;           // of a block of keys
constexpr int64_t kLine = 16;            // elements; scratch arrays start at multiples of it

// Row-major C (m, n) = op(A) op(B), or C += that. Straight to the CPU kernel, past the dispatcher: blocks are small.
template <typename T>
void product(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
             int64_t ldb, bool add, T* c, int64_t ldc) {
  const auto matrix = [](const T* x, int64_t rows, int64_t columns, int64_t stride, bool transposed) {
    const std::array<int64_t, 2> strides = {transposed ? 1 : stride, transposed ? stride : 1};
    return at::from_blob(const_cast<T*>(x), {rows, columns}, strides, at::CppTypeToScalarType<T>::value);
  };
  const at::Tensor A = matrix(a, m, k, lda, transpose_a), B = matrix(b, k, n, ldb, transpose_b);
  at::Tensor C = matrix(c, m, n, ldc, false);
  if (add) at::cpu::addmm_(C, A, B); else at::cpu::mm_out(C, A, B);
}

// Rows of one head.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
};

template <typename T>
Rows<T> rows_of(const at::Tensor& x, int64_t token, int64_t head) {
  return {x.const_data_ptr<T>() + token * x.stride(0) + head * x.stride(1), x.stride(0)};
}

// n rows, converted and multiplied, one after another.
template <typename in_t, typename T>
void gather(const Rows<in_t>& from, int64_t n, int64_t width, T factor, T* to) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t c = 0; c < width; ++c) to[i * width + c] = factor * T(from.data[i * from.stride + c]);
  }
}

// n rows for a product: where they are if their type is T already, else converted.
template <typename in_t, typename T>
Rows<T> operand(const Rows<in_t>& from, int64_t n, int64_t width, T* buffer) {
  if constexpr (std::is_same_v<in_t, T>) {
    return from;
  } else {
    gather(from, n, width, T(1), buffer);
    return {buffer, width};
  }
}

// Query positions [from, to) of one sequence and key head: a block of them forward, all backward.
struct Task {
  int64_t start;  // token of the sequence's first position
  int64_t kv, from, to;
};

struct Problem {
  at::Tensor q, k, v;  // rows contiguous
  int64_t T, H, Hkv, G, d, dv, window;
  int64_t positions;  // of a block of queries
  double scale, softcap;  // softcap 0: none
  std::vector<Task> tasks;

  int64_t first_key(int64_t i) const { return std::max<int64_t>(0, i - window + 1); }

  // The keys of a block [k0, k0 + B) that position i sees, as a range within the block.
  std::pair<int64_t, int64_t> seen(int64_t i, int64_t k0, int64_t B) const {
    return {std::clamp<int64_t>(first_key(i) - k0, 0, B), std::clamp<int64_t>(i + 1 - k0, 0, B)};
  }
};

// A product needs a row stride of at least a row (an expanded tensor has 0).
at::Tensor with_plain_rows(const at::Tensor& x) {
  return x.stride(2) == 1 && x.stride(0) >= x.size(2) ? x : x.contiguous();
}

Problem make_problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens,
                     double scale, std::optional<int64_t> window, std::optional<double> softcap, bool backward) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && k.size(0) == q.size(0) && v.size(0) == q.size(0) &&
                  k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0 && v.size(1) == k.size(1) &&
                  q.size(2) > 0 && k.size(2) == q.size(2) && v.size(2) > 0,
              "packed_attention: wanted q (T, H, d), k (T, Hkv, d), v (T, Hkv, dv), Hkv a divisor of H, got ",
              q.sizes(), ", ", k.sizes(), " and ", v.sizes());
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
              "packed_attention: q, k and v must be of one dtype, got ", q.scalar_type(), ", ", k.scalar_type(),
              " and ", v.scalar_type());
  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 && cu_seqlens.device().is_cpu() &&
                  at::isIntegralType(cu_seqlens.scalar_type(), false),
              "packed_attention: cu_seqlens must be int32 or int64 (S+1,) on the host, got ", cu_seqlens.scalar_type(),
              " ", cu_seqlens.sizes());
  TORCH_CHECK(window.value_or(1) > 0 && softcap.value_or(1) > 0,
              "packed_attention: window and softcap must be positive or none");
  Problem p{with_plain_rows(q), with_plain_rows(k), with_plain_rows(v)};
  p.T = q.size(0), p.H = q.size(1), p.Hkv = k.size(1), p.G = p.H / p.Hkv, p.d = q.size(2), p.dv = v.size(2);
  p.window = window.value_or(p.T + 1), p.scale = scale, p.softcap = softcap.value_or(0);
  p.positions = std::max(kLeastPositions, kRows / p.G);
  const at::Tensor offsets = cu_seqlens.to(at::kLong).contiguous();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  const int64_t S = offsets.size(0) - 1;
  bool rises = offset[0] == 0 && offset[S] == p.T;
  for (int64_t s = 0; s < S; ++s) rises = rises && offset[s] <= offset[s + 1];
  TORCH_CHECK(rises, "packed_attention: cu_seqlens must rise from 0 to T = ", p.T);
  for (int64_t s = 0; s < S; ++s) {
    const int64_t length = offset[s + 1] - offset[s], step = backward ? std::max<int64_t>(1, length) : p.positions;
    for (int64_t kv = 0; kv < p.Hkv; ++kv) {
      for (int64_t from = 0; from < length; from += step) {
        p.tasks.push_back({offset[s], kv, from, std::min(length, from + step)});
      }
    }
  }
  std::stable_sort(p.tasks.begin(), p.tasks.end(), [](const Task& a, const Task& b) { return a.to > b.to; });
  return p;
}

// What a thread works in, for a block of M rows and B keys.
template <typename T>
struct Scratch {
  T *q, *k, *v, *scores, *sums, *max, *sum;  // sums (M, dv): of the values, before the division by sum (M,)
  T *dscores, *upstream, *out, *delta, *dq;  // backward alone
  at::Tensor memory;

  Scratch(const Problem& p, bool backward) {
    const int64_t M = p.G * p.positions, own = backward ? M : 0;
    const std::pair<T**, int64_t> arrays[] = {
        {&q, M * p.d},  {&k, kKeys * p.d}, {&v, kKeys * p.dv}, {&scores, M * kKeys},    {&sums, M * p.dv},
        {&max, M},      {&sum, M},         {&delta, own},      {&dscores, own * kKeys}, {&upstream, own * p.dv},
        {&out, own * p.dv}, {&dq, own * p.d}};
    const auto padded = [](int64_t size) { return (size + kLine - 1) / kLine * kLine; };
    int64_t total = 0;
    for (const auto& [place, size] : arrays) total += padded(size);
    memory = at::empty({total}, at::CppTypeToScalarType<T>::value);
    T* next = memory.mutable_data_ptr<T>();
    for (const auto& [place, size] : arrays) {
      *place = next;
      next += padded(size);
    }
  }
};

// f(scratch, task) for every task.
template <typename T, typename F>
void each_task(const Problem& p, bool backward, F f) {
  if (p.tasks.empty()) return;
  std::atomic<size_t> next{0};
  // at least 2, so that the products know themselves inside a parallel region, where they run on one thread
  const int64_t workers = std::max<int64_t>(2, std::min<int64_t>(at::get_num_threads(), p.tasks.size()));
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    Scratch<T> scratch(p, backward);
    for (size_t i = next++; i < p.tasks.size(); i = next++) f(scratch, p.tasks[i]);
  });
}

// Raw scores x (n,) capped, in place.
template <typename T>
void cap(T* x, int64_t n, T softcap) {
  using Vec = at::vec::Vectorized<T>;
  const Vec c(softcap), inverse(1 / softcap);
  at::vec::map([&](Vec a) { return c * (a * inverse).tanh(); }, x, x, n);
}

// x (n,) becomes exp(x - max); returns their sum.
template <typename T>
T exp_row(T* x, int64_t n, T max) {
  using Vec = at::vec::Vectorized<T>;
  const Vec max_vec(max);
  Vec sum(0);
  int64_t j = 0;
  for (; j + Vec::size() <= n; j += Vec::size()) {
    const Vec e = (Vec::loadu(x + j) - max_vec).exp_u20();
    sum = sum + e;
    e.store(x + j);
  }
  if (j < n) {
    const Vec e = (Vec::loadu(x + j, n - j) - max_vec).exp_u20();
    sum = sum + Vec::set(Vec(0), e, n - j);
    e.store(x + j, n - j);
  }
  return at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, sum);
}

// Scores x (n,) of one row become exp(x - max), under the maximum so far. Returns the factor on what was summed before.
template <typename T>
T forward_row(T* x, int64_t n, T softcap, T& max, T& sum) {
  using Vec = at::vec::Vectorized<T>;
  if (softcap > 0) cap(x, n, softcap);
  const T top = at::vec::reduce_all<T>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, x, n);
  const T before = max;
  max = top > before || std::isnan(top) ? top : before;
  if (!std::isfinite(max)) {  // exp_u20 would make a number of it
    max = sum = std::numeric_limits<T>::quiet_NaN();
    std::fill(x, x + n, T(0));
    return T(1);
  }
  const T shrink = std::exp(before - max);
  sum = sum * shrink + exp_row(x, n, max);
  return shrink;
}

// Scores x (n,) of one row become p, do.v in ds (n,) becomes ds.
template <typename T>
void backward_row(T* x, T* ds, int64_t n, T softcap, T lse, T delta) {
  using Vec = at::vec::Vectorized<T>;
  if (!std::isfinite(lse)) {
    std::fill(x, x + n, lse);
    std::fill(ds, ds + n, lse);
    return;
  }
  if (softcap > 0) {
    cap(x, n, softcap);
    const Vec inverse(1 / softcap), one(1), delta_vec(delta);
    const auto slope = [&](Vec z) { return one - (z * inverse) * (z * inverse); };
    at::vec::map2([&](Vec g, Vec z) { return (g - delta_vec) * slope(z); }, ds, ds, x, n);
    delta = 0;
  }
  exp_row(x, n, lse);
  at::vec::map2([delta](Vec g, Vec e) { return e * (g - Vec(delta)); }, ds, ds, x, n);
}

template <typename T>
void zero_outside(T* x, int64_t B, std::pair<int64_t, int64_t> seen) {
  std::fill(x, x + std::min(seen.first, seen.second), T(0));
  std::fill(x + seen.second, x + B, T(0));
}

template <typename in_t, typename T>
void forward_task(const Problem& p, Scratch<T>& s, const Task& task, at::Tensor& out, at::Tensor& lse) {
  using Vec = at::vec::Vectorized<T>;
  const int64_t n = task.to - task.from, M = p.G * n, token = task.start + task.from;
  for (int64_t g = 0; g < p.G; ++g) {
    gather(rows_of<in_t>(p.q, token, task.kv * p.G + g), n, p.d, T(p.scale), s.q + g * n * p.d);
  }
  std::fill(s.max, s.max + M, -std::numeric_limits<T>::infinity());
  std::fill(s.sum, s.sum + M, T(0));
  const int64_t low = p.first_key(task.from);
  for (int64_t k0 = low; k0 < task.to; k0 += kKeys) {
    const int64_t B = std::min(kKeys, task.to - k0);
    const Rows<T> k = operand(rows_of<in_t>(p.k, task.start + k0, task.kv), B, p.d, s.k);
    const Rows<T> v = operand(rows_of<in_t>(p.v, task.start + k0, task.kv), B, p.dv, s.v);
    product(false, true, M, B, p.d, s.q, p.d, k.data, k.stride, false, s.scores, B);
    for (int64_t m = 0; m < M; ++m) {
      T* x = s.scores + m * B;
      const auto seen = p.seen(task.from + m % n, k0, B);
      zero_outside(x, B, seen);
      if (seen.first >= seen.second) continue;
      const T shrink = forward_row(x + seen.first, seen.second - seen.first, T(p.softcap), s.max[m], s.sum[m]);
      T* sums = s.sums + m * p.dv;
      if (k0 > low && shrink != T(1)) at::vec::map([shrink](Vec a) { return a * Vec(shrink); }, sums, sums, p.dv);
    }
    product(false, false, M, p.dv, B, s.scores, B, v.data, v.stride, k0 > low, s.sums, p.dv);
  }
  for (int64_t m = 0; m < M; ++m) {
    const int64_t head = task.kv * p.G + m / n, row = token + m % n;
    const T factor = 1 / s.sum[m];
    lse.mutable_data_ptr<T>()[head * p.T + row] = s.max[m] + std::log(s.sum[m]);
    in_t* to = out.mutable_data_ptr<in_t>() + (row * p.H + head) * p.dv;
    for (int64_t c = 0; c < p.dv; ++c) to[c] = in_t(factor * s.sums[m * p.dv + c]);
  }
}

template <typename in_t, typename T>
void backward_task(const Problem& p, Scratch<T>& s, const Task& task, const at::Tensor& upstream, const at::Tensor& out,
                   const at::Tensor& lse, at::Tensor& dq, at::Tensor& dk, at::Tensor& dv) {
  using Vec = at::vec::Vectorized<T>;
  for (int64_t q0 = task.from; q0 < task.to; q0 += p.positions) {
    const int64_t n = std::min(p.positions, task.to - q0), M = p.G * n, token = task.start + q0;
    for (int64_t g = 0; g < p.G; ++g) {
      const int64_t head = task.kv * p.G + g;
      gather(rows_of<in_t>(p.q, token, head), n, p.d, T(p.scale), s.q + g * n * p.d);
      gather(rows_of<in_t>(upstream, token, head), n, p.dv, T(1), s.upstream + g * n * p.dv);
      gather(rows_of<in_t>(out, token, head), n, p.dv, T(1), s.out + g * n * p.dv);
    }
    for (int64_t m = 0; m < M; ++m) {
      s.delta[m] = at::vec::map2_reduce_all<T>([](Vec a, Vec b) { return a * b; }, [](Vec a, Vec b) { return a + b; },
                                               s.upstream + m * p.dv, s.out + m * p.dv, p.dv);
    }
    const int64_t low = p.first_key(q0);
    for (int64_t k0 = low; k0 < q0 + n; k0 += kKeys) {
      const int64_t B = std::min(kKeys, q0 + n - k0);
      const Rows<T> k = operand(rows_of<in_t>(p.k, task.start + k0, task.kv), B, p.d, s.k);
      const Rows<T> v = operand(rows_of<in_t>(p.v, task.start + k0, task.kv), B, p.dv, s.v);
      product(false, true, M, B, p.d, s.q, p.d, k.data, k.stride, false, s.scores, B);
      product(false, true, M, B, p.dv, s.upstream, p.dv, v.data, v.stride, false, s.dscores, B);
      for (int64_t m = 0; m < M; ++m) {
        T *x = s.scores + m * B, *ds = s.dscores + m * B;
        const auto seen = p.seen(q0 + m % n, k0, B);
        zero_outside(x, B, seen);
        zero_outside(ds, B, seen);
        if (seen.first >= seen.second) continue;
        const T row_lse = lse.const_data_ptr<T>()[(task.kv * p.G + m / n) * p.T + token + m % n];
        backward_row(x + seen.first, ds + seen.first, seen.second - seen.first, T(p.softcap), row_lse, s.delta[m]);
      }
      const int64_t key = (task.start + k0) * p.Hkv + task.kv;
      T *dk_rows = dk.mutable_data_ptr<T>() + key * p.d, *dv_rows = dv.mutable_data_ptr<T>() + key * p.dv;
      product(true, false, B, p.dv, M, s.scores, B, s.upstream, p.dv, true, dv_rows, p.Hkv * p.dv);
      product(true, false, B, p.d, M, s.dscores, B, s.q, p.d, true, dk_rows, p.Hkv * p.d);
      product(false, false, M, p.d, B, s.dscores, B, k.data, k.stride, k0 > low, s.dq, p.d);
    }
    for (int64_t m = 0; m < M; ++m) {
      T* to = dq.mutable_data_ptr<T>() + ((token + m % n) * p.H + task.kv * p.G + m / n) * p.d;
      for (int64_t c = 0; c < p.d; ++c) to[c] = T(p.scale) * s.dq[m * p.d + c];
    }
  }
}

// -> out (T, H, dv) in q's dtype, lse (H, T) in opmath precision
std::tuple<at::Tensor, at::Tensor> packed_attention_fwd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens, double scale,
    std::optional<int64_t> window, std::optional<double> softcap) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Problem p = make_problem(q, k, v, cu_seqlens, scale, window, softcap, false);
  at::Tensor out = at::empty({p.T, p.H, p.dv}, q.options());
  at::Tensor lse = at::empty({p.H, p.T}, q.options().dtype(at::toOpMathType(q.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, q.scalar_type(), "packed_attention_fwd", [&] {
    using T = at::opmath_type<scalar_t>;
    each_task<T>(p, false, [&](Scratch<T>& s, const Task& task) { forward_task<scalar_t>(p, s, task, out, lse); });
  });
  return {out, lse};
}

// -> the gradients of q, k and v, contiguous
std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_bwd(
    const at::Tensor& upstream_in, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_seqlens, double scale, std::optional<int64_t> window,
    std::optional<double> softcap) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Problem p = make_problem(q, k, v, cu_seqlens, scale, window, softcap, true);
  const auto options = q.options().dtype(at::toOpMathType(q.scalar_type()));
  TORCH_CHECK(out.sizes() == at::IntArrayRef({p.T, p.H, p.dv}) && out.scalar_type() == q.scalar_type() &&
                  out.stride(2) == 1 && upstream_in.sizes() == out.sizes() &&
                  upstream_in.scalar_type() == q.scalar_type(),
              "packed_attention: out and upstream must be ", q.scalar_type(), " (T, H, dv) = (", p.T, ", ", p.H, ", ",
              p.dv, "), got ", out.scalar_type(), " ", out.sizes(), " and ", upstream_in.scalar_type(), " ",
              upstream_in.sizes());
  TORCH_CHECK(lse.sizes() == at::IntArrayRef({p.H, p.T}) && lse.is_contiguous() && lse.dtype() == options.dtype(),
              "packed_attention: lse must be a contiguous (H, T), got ", lse.dtype(), " ", lse.sizes());
  const at::Tensor upstream = with_plain_rows(upstream_in);
  at::Tensor dq = at::empty({p.T, p.H, p.d}, options);
  at::Tensor dk = at::zeros({p.T, p.Hkv, p.d}, options), dv = at::zeros({p.T, p.Hkv, p.dv}, options);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, q.scalar_type(), "packed_attention_bwd", [&] {
    using T = at::opmath_type<scalar_t>;
    each_task<T>(p, true, [&](Scratch<T>& s, const Task& task) {
      backward_task<scalar_t>(p, s, task, upstream, out, lse, dq, dk, dv);
    });
  });
  return {dq.to(q.scalar_type()), dk.to(q.scalar_type()), dv.to(q.scalar_type())};
}

}  // namespace
}  // namespace ddpo

TORCH_LIBRARY_IMPL(ddpo, CPU, m) {
  m.impl("packed_attention_fwd", &ddpo::packed_attention_fwd);
  m.impl("packed_attention_bwd", &ddpo::packed_attention_bwd);
}

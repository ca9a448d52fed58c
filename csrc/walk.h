// What the CPU kernels of linear_logp share: logits of a head block, the online softmax, the walk over blocks.
// Letters: N rows, D width, V vocabulary, B rows of a head block.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace ddpo {

constexpr int64_t kRows = 1024;           // rows of hidden that a block of logits spans at most
constexpr int64_t kBlockBytes = 8 << 20;  // of the logits in flight: they stay in a last-level cache

// How raw products become logits. The factor scale of the gradient is applied once, at the end.
template <typename T>
struct Logits {
  const T* bias;  // (V,) or null
  T scale;
  T softcap;  // 0: none

  bool plain() const { return !bias && scale == T(1) && softcap == T(0); }

  void apply(T* z, int64_t v0, int64_t B) const {
    if (plain()) return;
    for (int64_t v = 0; v < B; ++v) {
      const T x = scale * (bias ? z[v] + bias[v0 + v] : z[v]);
      z[v] = softcap > 0 ? softcap * std::tanh(x / softcap) : x;
    }
  }

  T slope(T z) const { return softcap > 0 ? 1 - (z / softcap) * (z / softcap) : T(1); }
};

// Online softmax of one row over the blocks of the vocabulary.
template <typename T>
struct RowState {
  T max = -std::numeric_limits<T>::infinity();
  T sum = 0;
  T target = 0;  // its logit

  T lse() const { return max + std::log(sum); }
};

// exp(z - max) of a block, summed; stored over z (times the cap's slope) where `store`.
template <typename T>
T exp_block(T* z, int64_t B, T max, const Logits<T>& logits, bool store) {
  using Vec = at::vec::Vectorized<T>;
  const bool capped = logits.softcap > 0;
  const Vec max_vec(max), one(1), inv_cap(capped ? 1 / logits.softcap : T(0));
  Vec sum_vec(0);
  int64_t v = 0;
  for (; v + Vec::size() <= B; v += Vec::size()) {
    const Vec x = Vec::loadu(z + v);
    const Vec e = (x - max_vec).exp_u20();
    sum_vec = sum_vec + e;
    if (store && capped) {
      const Vec t = x * inv_cap;
      (e * (one - t * t)).store(z + v);
    } else if (store) {  // not through the slope: -inf * 0 is not a number
      e.store(z + v);
    }
  }
  T sum = at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, sum_vec);
  for (; v < B; ++v) {
    const T e = std::exp(z[v] - max);
    sum += e;
    if (store) z[v] = e * logits.slope(z[v]);
  }
  return sum;
}

// out += a * x
template <typename T>
void axpy(T* out, T a, const T* x, int64_t n) {
  using Vec = at::vec::Vectorized<T>;
  const Vec a_vec(a);
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) {
    at::vec::fmadd(a_vec, Vec::loadu(x + i), Vec::loadu(out + i)).store(out + i);
  }
  for (; i < n; ++i) out[i] += a * x[i];
}

template <typename T>
void scale_row(T* x, T factor, int64_t n) {
  using Vec = at::vec::Vectorized<T>;
  at::vec::map([factor](Vec a) { return a * Vec(factor); }, x, x, n);
}

// The walk over blocks of the vocabulary and chunks of rows that all kernels share.
struct Walk {
  at::Tensor hidden, head;       // (N, D) in opmath precision, (V, D) as it is
  at::Tensor buffer;             // a block of logits
  std::vector<int64_t> offsets;  // of the chunks of rows
  int64_t N, V, D, B;

  // block: head rows taken together; 0: as many as keep a block of logits in cache
  Walk(const at::Tensor& hidden_, const at::Tensor& head_, int64_t block) : head(head_) {
    hidden = hidden_.to(at::toOpMathType(hidden_.scalar_type())).contiguous();
    N = hidden.size(0), D = hidden.size(1), V = head.size(0);
    // even chunks of at most kRows, none of them a single row unless N is
    const int64_t chunks = std::max<int64_t>(1, (N + kRows - 1) / kRows), most = std::max<int64_t>(1, (N + chunks - 1) / chunks);
    for (int64_t i = 0; i <= chunks; ++i) offsets.push_back(N * i / chunks);
    const bool converts = head.scalar_type() != hidden.scalar_type() || !head.is_contiguous();
    const int64_t row_bytes = std::max(most, converts ? D : 1) * hidden.element_size();  // of logits, of a head block
    B = std::min(V, block ? block : std::max<int64_t>(64, kBlockBytes / row_bytes / 64 * 64));
    buffer = at::empty({most * B}, hidden.options());
  }

  // f(v0, head block (b, D), row0, hidden chunk (n, D), raw products (n, b)), then after(v0, head block)
  template <typename F, typename After>
  void each(F f, After after) const {
    for (int64_t v0 = 0; v0 < V; v0 += B) {
      const int64_t b = std::min(B, V - v0);
      const at::Tensor block = head.narrow(0, v0, b).to(hidden.scalar_type()).contiguous();
      for (size_t i = 1; i < offsets.size(); ++i) {
        const int64_t row0 = offsets[i - 1], n = offsets[i] - row0;
        if (!n) continue;
        const at::Tensor chunk = hidden.narrow(0, row0, n);
        at::Tensor z = buffer.narrow(0, 0, n * b).view({n, b});
        at::mm_out(z, chunk, block.t());
        f(v0, block, row0, chunk, z);
      }
      after(v0, block);
    }
  }

  template <typename F>
  void each(F f) const {
    each(f, [](int64_t, const at::Tensor&) {});
  }
};

template <typename T>
Logits<T> logits_of(const std::optional<at::Tensor>& bias, double scale, std::optional<double> softcap) {
  return {bias ? bias->const_data_ptr<T>() : nullptr, T(scale), T(softcap.value_or(0))};
}

// Inside a kernel: no autograd and no autocast for the products that it calls.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

inline void check(const at::Tensor& hidden, const at::Tensor& head, const at::Tensor& targets,
           const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(hidden.dim() == 2 && head.dim() == 2 && head.size(1) == hidden.size(1) && head.size(0) > 0,
              "linear_logp: wanted hidden (N, D) and head (V, D), got ", hidden.sizes(), " and ", head.sizes());
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == hidden.size(0) && targets.is_contiguous() &&
                  targets.scalar_type() == at::kLong,
              "linear_logp: targets must be a contiguous int64 (", hidden.size(0), ",), got ", targets.scalar_type(),
              " ", targets.sizes());
  TORCH_CHECK(!bias || bias->sizes() == at::IntArrayRef({head.size(0)}), "linear_logp: bias must be (V,) = (",
              head.size(0), ",)");
  if (targets.numel()) {
    const auto [low, high] = at::aminmax(targets);
    TORCH_CHECK(low.item<int64_t>() >= 0 && high.item<int64_t>() < head.size(0),
                "linear_logp: targets must lie in [0, ", head.size(0), "), got ", low.item<int64_t>(), " to ",
                high.item<int64_t>());
  }
}

// One row's block of logits z (B), in place: raw products become exp(z - max) (times the cap's slope) where the
// gradient's row `out` (D) is summed, and `out` is scaled down with the running maximum.
template <typename T>
void forward_row(T* z, int64_t B, int64_t v0, int64_t target, const Logits<T>& logits, RowState<T>& row, T* out,
                 int64_t D) {
  using Vec = at::vec::Vectorized<T>;
  logits.apply(z, v0, B);
  if (target >= v0 && target < v0 + B) row.target = z[target - v0];
  const T top = at::vec::reduce_all<T>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, z, B);
  if (std::isnan(top) || std::isnan(row.max)) {  // exp_u20 would make a number of it
    row.max = row.sum = std::numeric_limits<T>::quiet_NaN();
    if (out) std::fill(z, z + B, T(0));
    return;
  }
  const T max = std::max(row.max, top);
  if (max == -std::numeric_limits<T>::infinity()) {  // a block of impossible tokens
    if (out) std::fill(z, z + B, T(0));
    return;
  }
  const T shrink = std::exp(row.max - max);
  row.max = max;
  row.sum = row.sum * shrink + exp_block(z, B, max, logits, out != nullptr);
  if (out && shrink != T(1)) scale_row(out, shrink, D);
}

// Log-probs (and, where wanted, log-sum-exps) of finished rows; where `own`, the target's head rows (N, D), is given,
// `out` (N, D) becomes the gradient's rows.
template <typename T>
void finish(const std::vector<RowState<T>>& rows, const Logits<T>& logits, const at::Tensor& own, at::Tensor& logp,
            T* lse, at::Tensor& out) {
  const int64_t N = rows.size(), D = out.size(1);
  T* logp_data = logp.mutable_data_ptr<T>();
  const T* own_data = own.defined() ? own.const_data_ptr<T>() : nullptr;
  T* out_data = own_data ? out.mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      logp_data[i] = (rows[i].target - rows[i].max) - std::log(rows[i].sum);  // near 0 it keeps its digits
      if (lse) lse[i] = rows[i].lse();
      if (!own_data) continue;
      const T a = logits.scale * logits.slope(rows[i].target), b = -logits.scale / rows[i].sum;
      for (int64_t d = 0; d < D; ++d) out_data[i * D + d] = a * own_data[i * D + d] + b * out_data[i * D + d];
    }
  });
}

}  // namespace ddpo

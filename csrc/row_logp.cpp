// The row pass of linear_logp on the CPU. Spec: ddpo/reference.py::linear_logp.
//   z (n, V) logits, targets (n,)  ->  logp (n,) = z[targets] - logsumexp(z)
//   with grad, z becomes d logp / d z = onehot(targets) - softmax(z), in place
// Per row: one pass for the maximum, one for the sum (with grad it stores exp(z - max)), one to scale.
// A row is one thread's work from start to end, so the bits do not depend on the number of threads.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace ddpo {
namespace {

template <typename scalar_t>
scalar_t row_logp(scalar_t* z, int64_t target, int64_t V, bool grad) {
  using Vec = at::vec::Vectorized<scalar_t>;
  const scalar_t max = at::vec::reduce_all<scalar_t>(
      [](Vec a, Vec b) { return at::vec::maximum(a, b); }, z, V);
  const Vec max_vec(max);
  const scalar_t z_target = z[target];

  Vec sum_vec(0);
  int64_t v = 0;
  for (; v + Vec::size() <= V; v += Vec::size()) {
    const Vec e = (Vec::loadu(z + v) - max_vec).exp();
    sum_vec = sum_vec + e;
    if (grad) e.store(z + v);
  }
  scalar_t sum = at::vec::vec_reduce_all<scalar_t>([](Vec a, Vec b) { return a + b; }, sum_vec);
  for (; v < V; ++v) {
    const scalar_t e = std::exp(z[v] - max);
    sum += e;
    if (grad) z[v] = e;
  }

  if (grad) {
    const scalar_t factor = -1 / sum;
    at::vec::map([factor](Vec e) { return e * Vec(factor); }, z, z, V);
    z[target] += 1;
  }
  return z_target - max - std::log(sum);
}

at::Tensor row_logp_(at::Tensor& z, const at::Tensor& targets, bool grad) {
  TORCH_CHECK(z.dim() == 2 && z.is_contiguous() && z.size(1) > 0,
              "row_logp_: z must be a contiguous (n, V) with V >= 1, got ", z.sizes());
  TORCH_CHECK(targets.dim() == 1 && targets.size(0) == z.size(0) && targets.is_contiguous() &&
                  targets.scalar_type() == at::kLong,
              "row_logp_: targets must be a contiguous int64 (", z.size(0), ",), got ",
              targets.scalar_type(), " ", targets.sizes());
  const int64_t n = z.size(0), V = z.size(1);
  at::Tensor logp = at::empty({n}, z.options());
  const int64_t* target = targets.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "row_logp_", [&] {
    scalar_t* z_data = z.mutable_data_ptr<scalar_t>();
    scalar_t* logp_data = logp.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        TORCH_CHECK(target[i] >= 0 && target[i] < V, "row_logp_: targets must lie in [0, ", V, "), got ", target[i]);
        logp_data[i] = row_logp(z_data + i * V, target[i], V, grad);
      }
    });
  });
  return logp;
}

at::Tensor row_logp_meta(at::Tensor& z, const at::Tensor& targets, bool) {
  return at::empty_symint({targets.sym_size(0)}, z.options());
}

}  // namespace
}  // namespace ddpo

TORCH_LIBRARY_IMPL(ddpo, CPU, m) { m.impl("row_logp_", &ddpo::row_logp_); }
TORCH_LIBRARY_IMPL(ddpo, Meta, m) { m.impl("row_logp_", &ddpo::row_logp_meta); }

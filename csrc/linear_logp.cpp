// linear_logp on the CPU: target log-probs and the rows of their gradient, without an (N, V) buffer.
// Spec: ddpo/reference.py::linear_logp.
//
//   z[n,v]  = scale * (h[n].W[v] + b[v]), capped;  logp[n] = z[n,y] - lse[n]
//   row[n]  = d logp[n] / d h[n] = f[n,y] W[y] - sum_v p[n,v] f[n,v] W[v],   f = scale * (1 - (z/softcap)^2)
//
// The vocabulary is walked in blocks of head rows; each block's logits for all rows of a chunk lie in cache while the
// row pass reads them and the second product uses them. The sums are kept relative to the running maximum m:
//   s[n] = sum_v exp(z - m),   o[n] = sum_v exp(z - m) f W[v],   both scaled down when m rises (online softmax).
// So nothing is recomputed, no head block is read from memory twice, and nothing of size V is kept.
//
// Letters: N rows, D width, V vocabulary, B rows of a head block, S segments.
#include "walk.h"

namespace ddpo {
namespace {

// z (n, B) raw products -> the gradient of the products: upstream * slope * (onehot - softmax), in place.
template <typename T>
void backward_block(T* z, int64_t n, int64_t B, int64_t v0, const int64_t* targets, const Logits<T>& logits,
                    const T* lse, const T* upstream) {
  using Vec = at::vec::Vectorized<T>;
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* z_i = z + i * B;
      logits.apply(z_i, v0, B);
      const bool here = targets[i] >= v0 && targets[i] < v0 + B;
      const T slope = here ? logits.slope(z_i[targets[i] - v0]) : T(0);
      exp_block(z_i, B, lse[i], logits, true);
      const T factor = -upstream[i] * logits.scale;
      at::vec::map([factor](Vec e) { return e * Vec(factor); }, z_i, z_i, B);
      if (here) z_i[targets[i] - v0] -= factor * slope;
    }
  });
}

// -> logp (N,), lse (N,), rows (N, D) in hidden's dtype (empty unless wanted)
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_logp_fwd(
    const at::Tensor& hidden, const at::Tensor& head, const at::Tensor& targets,
    const std::optional<at::Tensor>& bias_in, double scale, std::optional<double> softcap, bool want_rows) {
  const Plain plain;
  check(hidden, head, targets, bias_in);
  const Walk walk(hidden, head, 0);
  const auto options = walk.hidden.options();
  const std::optional<at::Tensor> bias = bias_in ? std::optional(bias_in->to(options).contiguous()) : std::nullopt;
  at::Tensor logp = at::empty({walk.N}, options), lse = at::empty({walk.N}, options);
  at::Tensor out = at::zeros({want_rows ? walk.N : 0, walk.D}, options);  // sum_v exp(z - max) slope W[v]
  const int64_t* y = targets.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "linear_logp_fwd", [&] {
    const Logits<scalar_t> logits = logits_of<scalar_t>(bias, scale, softcap);
    std::vector<RowState<scalar_t>> rows(walk.N);
    walk.each([&](int64_t v0, const at::Tensor& block, int64_t row0, const at::Tensor&, at::Tensor& z) {
      const int64_t n = z.size(0);
      scalar_t *z_data = z.mutable_data_ptr<scalar_t>(), *sums = out.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          forward_row(z_data + i * z.size(1), z.size(1), v0, y[row0 + i], logits, rows[row0 + i],
                      want_rows ? sums + (row0 + i) * walk.D : nullptr, walk.D);
        }
      });
      if (want_rows) out.narrow(0, row0, n).addmm_(z, block);
    });
    finish(rows, logits, want_rows && walk.N ? head.index_select(0, targets).to(options) : at::Tensor(), logp,
           lse.mutable_data_ptr<scalar_t>(), out);
  });
  return {logp, lse, out.to(hidden.scalar_type())};
}

// Gradients with the logits recomputed; each is empty unless wanted, in opmath precision.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_logp_bwd(
    const at::Tensor& hidden, const at::Tensor& head, const at::Tensor& targets,
    const std::optional<at::Tensor>& bias_in, double scale, std::optional<double> softcap, const at::Tensor& lse,
    const at::Tensor& upstream, bool want_hidden, bool want_head, bool want_bias) {
  const Plain plain;
  check(hidden, head, targets, bias_in);
  const Walk walk(hidden, head, 0);
  const auto options = walk.hidden.options();
  const std::optional<at::Tensor> bias = bias_in ? std::optional(bias_in->to(options).contiguous()) : std::nullopt;
  at::Tensor grad_hidden = at::zeros({want_hidden ? walk.N : 0, walk.D}, options);
  at::Tensor grad_head = at::empty({want_head ? walk.V : 0, walk.D}, options);
  at::Tensor grad_bias = at::empty({want_bias ? walk.V : 0}, options);
  if (!walk.N) return {grad_hidden, grad_head.zero_(), grad_bias.zero_()};
  TORCH_CHECK(lse.sizes() == at::IntArrayRef({walk.N}) && lse.is_contiguous() && lse.dtype() == options.dtype() &&
                  upstream.sizes() == lse.sizes(),
              "linear_logp: lse and upstream must be (N,) = (", walk.N, ",), got ", lse.dtype(), " ", lse.sizes(),
              " and ", upstream.sizes());
  const at::Tensor upstream_c = upstream.to(options).contiguous();
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "linear_logp_bwd", [&] {
    const Logits<scalar_t> logits = logits_of<scalar_t>(bias, scale, softcap);
    walk.each([&](int64_t v0, const at::Tensor& block, int64_t row0, const at::Tensor& chunk, at::Tensor& z) {
      const int64_t n = z.size(0), b = z.size(1);
      backward_block(z.mutable_data_ptr<scalar_t>(), n, b, v0, targets.const_data_ptr<int64_t>() + row0, logits,
                     lse.const_data_ptr<scalar_t>() + row0, upstream_c.const_data_ptr<scalar_t>() + row0);
      if (want_hidden) grad_hidden.narrow(0, row0, n).addmm_(z, block);
      if (want_head) {
        at::Tensor mine = grad_head.narrow(0, v0, b);
        if (row0 == 0) at::mm_out(mine, z.t(), chunk); else mine.addmm_(z.t(), chunk);
      }
      if (want_bias) {
        at::Tensor mine = grad_bias.narrow(0, v0, b);
        if (row0 == 0) at::sum_out(mine, z, 0); else mine.add_(z.sum(0));
      }
    });
  });
  return {grad_hidden, grad_head, grad_bias};
}

}  // namespace
}  // namespace ddpo

TORCH_LIBRARY_IMPL(ddpo, CPU, m) {
  m.impl("linear_logp_fwd", &ddpo::linear_logp_fwd);
  m.impl("linear_logp_bwd", &ddpo::linear_logp_bwd);
}

// What a transformer layer does beside its matrix products and attention, on the CPU, each in one pass over memory.
// Specs: ddpo/reference.py::rms_norm, silu_mul, rotary.
//
//   rms_norm  y = x r (w + offset), r = (mean x^2 + eps)^-1/2
//             dx = r (g - x r^2 mean(g x)), g = dy (w + offset);   dw = sum_t dy x r
//   silu_mul  y = gate s up, s = 1 / (1 + e^-gate);   dup = dy gate s,   dgate = dy up s (1 + gate (1 - s))
//   rotary    y = x cos + (-x2, x1) sin for the halves x = (x1, x2);   its transpose is the backward pass
//
// PyTorch's own arithmetic, operation by operation, without its intermediate tensors. A lane's value never depends on
// its place in a vector (tails are partial vectors), a row's never on its thread: the same bits for any thread count.
//
// Letters: T rows, D width, B batch, H heads, d width of a head.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

namespace ddpo {
namespace {

constexpr int64_t kGrain = 1 << 13;  // elements that are worth a thread
constexpr int64_t kSumRows = 64;     // rows whose part of the weight's gradient is summed together

int64_t grain_of_rows(int64_t row) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row)); }

void check_norm(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0) && x.dtype() == weight.dtype(),
              "rms_norm: wanted x (..., D) and weight (D,) of one dtype, got ", x.dtype(), " ", x.sizes(), " and ",
              weight.dtype(), " ", weight.sizes());
}

// -> y, like x and contiguous; r (T,)
std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x_in, const at::Tensor& weight_in, double eps,
                                            double offset) {
  check_norm(x_in, weight_in);
  const at::Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  const int64_t D = weight.size(0), T = D ? x.numel() / D : 0;
  at::Tensor y = at::empty(x.sizes(), x.options()), rstd = at::empty({T}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rms_norm", [&] {
    using Vec = at::vec::Vectorized<scalar_t>;
    const scalar_t *x_data = x.const_data_ptr<scalar_t>(), *w = weight.const_data_ptr<scalar_t>();
    scalar_t *y_data = y.mutable_data_ptr<scalar_t>(), *r_data = rstd.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, T, grain_of_rows(D), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const scalar_t* x_t = x_data + t * D;
        const scalar_t squares = at::vec::map_reduce_all<scalar_t>(
            [](Vec a) { return a * a; }, [](Vec a, Vec b) { return a + b; }, x_t, D);
        const scalar_t r = 1 / std::sqrt(squares / D + scalar_t(eps));
        r_data[t] = r;
        at::vec::map2<scalar_t>([&](Vec a, Vec b) { return a * Vec(r) * (b + Vec(scalar_t(offset))); },
                                y_data + t * D, x_t, w, D);
      }
    });
  });
  return {y, rstd};
}

// -> dx like x, dw (D,) or (0,)
std::tuple<at::Tensor, at::Tensor> rms_norm_bwd(const at::Tensor& dy_in, const at::Tensor& x_in,
                                                const at::Tensor& weight_in, const at::Tensor& rstd, double offset,
                                                bool want_weight) {
  check_norm(x_in, weight_in);
  const at::Tensor dy = dy_in.contiguous(), x = x_in.contiguous(), weight = weight_in.contiguous();
  const int64_t D = weight.size(0), T = D ? x.numel() / D : 0, blocks = (T + kSumRows - 1) / kSumRows;
  TORCH_CHECK_VALUE(dy.sizes() == x.sizes() && dy.dtype() == x.dtype() && rstd.numel() == T,
              "rms_norm: wanted dy like x ", x.sizes(), " and rstd (", T, ",), got ", dy.sizes(), " and ", rstd.sizes());
  at::Tensor dx = at::empty(x.sizes(), x.options());
  at::Tensor parts = at::zeros({want_weight ? blocks : 0, D}, x.options());  // of dw, by block of rows
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "rms_norm_bwd", [&] {
    using Vec = at::vec::Vectorized<scalar_t>;
    const Vec offset_vec = Vec(scalar_t(offset));
    const scalar_t *x_data = x.const_data_ptr<scalar_t>(), *w = weight.const_data_ptr<scalar_t>();
    const scalar_t *dy_data = dy.const_data_ptr<scalar_t>(), *r_data = rstd.const_data_ptr<scalar_t>();
    scalar_t *dx_data = dx.mutable_data_ptr<scalar_t>(), *parts_data = parts.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, blocks, grain_of_rows(kSumRows * D), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * kSumRows; t < std::min(T, end * kSumRows); ++t) {
        const scalar_t *x_t = x_data + t * D, *dy_t = dy_data + t * D, r = r_data[t];
        const scalar_t dot = at::vec::map3_reduce_all<scalar_t>(
            [&](Vec a, Vec g, Vec b) { return g * (b + offset_vec) * a; }, [](Vec a, Vec b) { return a + b; }, x_t,
            dy_t, w, D);
        const scalar_t c = r * r * r * dot / D;
        at::vec::map3<scalar_t>(
            [&](Vec a, Vec g, Vec b) { return g * (b + offset_vec) * Vec(r) - a * Vec(c); }, dx_data + t * D, x_t,
            dy_t, w, D);
        if (!want_weight) continue;
        scalar_t* part = parts_data + t / kSumRows * D;
        at::vec::map3<scalar_t>([&](Vec sum, Vec a, Vec g) { return sum + g * (a * Vec(r)); }, part, part, x_t, dy_t,
                                D);
      }
    });
  });
  at::Tensor dw = at::zeros({want_weight ? D : 0}, x.options());
  if (want_weight) {
    for (int64_t block = 0; block < blocks; ++block) dw.add_(parts[block]);  // in this order, whatever the threads
  }
  return {dx, dw};
}

void check_gated(const at::Tensor& gate, const at::Tensor& up) {
  TORCH_CHECK_VALUE(gate.sizes() == up.sizes() && gate.dtype() == up.dtype(), "silu_mul: wanted gate and up alike, got ",
              gate.dtype(), " ", gate.sizes(), " and ", up.dtype(), " ", up.sizes());
}

// f(offset, how many) over vectors of n elements, the last one partial
template <typename Vec, typename F>
void each_vector(int64_t n, F f) {
  at::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += Vec::size()) f(i, std::min<int64_t>(Vec::size(), end - i));
  });
}

at::Tensor silu_mul(const at::Tensor& gate_in, const at::Tensor& up_in) {
  check_gated(gate_in, up_in);
  const at::Tensor gate = gate_in.contiguous(), up = up_in.contiguous();
  at::Tensor y = at::empty(gate.sizes(), gate.options());
  AT_DISPATCH_FLOATING_TYPES(gate.scalar_type(), "silu_mul", [&] {
    using Vec = at::vec::Vectorized<scalar_t>;
    const scalar_t *g = gate.const_data_ptr<scalar_t>(), *u = up.const_data_ptr<scalar_t>();
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    each_vector<Vec>(gate.numel(), [&](int64_t i, int64_t n) {
      const Vec x = Vec::loadu(g + i, n);
      (x / (Vec(1) + x.neg().exp()) * Vec::loadu(u + i, n)).store(out + i, n);
    });
  });
  return y;
}

// -> dgate, dup
std::tuple<at::Tensor, at::Tensor> silu_mul_bwd(const at::Tensor& dy_in, const at::Tensor& gate_in,
                                                const at::Tensor& up_in) {
  check_gated(gate_in, up_in);
  const at::Tensor dy = dy_in.contiguous(), gate = gate_in.contiguous(), up = up_in.contiguous();
  TORCH_CHECK_VALUE(dy.sizes() == gate.sizes() && dy.dtype() == gate.dtype(), "silu_mul: dy must be like gate ",
              gate.sizes(), ", got ", dy.sizes());
  at::Tensor dgate = at::empty(gate.sizes(), gate.options()), dup = at::empty(gate.sizes(), gate.options());
  AT_DISPATCH_FLOATING_TYPES(gate.scalar_type(), "silu_mul_bwd", [&] {
    using Vec = at::vec::Vectorized<scalar_t>;
    const scalar_t *g = gate.const_data_ptr<scalar_t>(), *u = up.const_data_ptr<scalar_t>();
    const scalar_t* d = dy.const_data_ptr<scalar_t>();
    scalar_t *dg = dgate.mutable_data_ptr<scalar_t>(), *du = dup.mutable_data_ptr<scalar_t>();
    each_vector<Vec>(gate.numel(), [&](int64_t i, int64_t n) {
      const Vec one(1), x = Vec::loadu(g + i, n), up_i = Vec::loadu(u + i, n), dy_i = Vec::loadu(d + i, n);
      const Vec s = one / (one + x.neg().exp());
      (dy_i * up_i * s * (one + x * (one - s))).store(dg + i, n);
      (dy_i * (x * s)).store(du + i, n);
    });
  });
  return {dgate, dup};
}

struct Heads {  // x (B, H, T, d) of any strides but the last
  at::Tensor x, y;

  explicit Heads(const at::Tensor& in) : x(in.stride(3) == 1 || in.size(3) < 2 ? in : in.contiguous()) {
    y = at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);  // memory (B, T, H, d)
  }
};

// -> q and k turned; by the transpose where `back`
std::tuple<at::Tensor, at::Tensor> rotary(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& cos_in,
                                          const at::Tensor& sin_in, bool back) {
  const auto fits = [&](const at::Tensor& x) {
    return x.dim() == 4 && x.size(0) == q_in.size(0) && x.size(2) == q_in.size(2) && x.size(3) == q_in.size(3) &&
           x.dtype() == q_in.dtype();
  };
  TORCH_CHECK_VALUE(fits(q_in) && fits(k_in) && q_in.size(3) % 2 == 0, "rotary: wanted q and k (B, heads, T, d) with d even, "
              "got ", q_in.dtype(), " ", q_in.sizes(), " and ", k_in.dtype(), " ", k_in.sizes());
  const int64_t B = q_in.size(0), T = q_in.size(2), half = q_in.size(3) / 2;
  for (const at::Tensor& angle : {cos_in, sin_in}) {
    TORCH_CHECK_VALUE(angle.dim() == 3 && (angle.size(0) == B || angle.size(0) == 1) && angle.size(1) == T &&
                    angle.size(2) == 2 * half && angle.dtype() == q_in.dtype(),
                "rotary: wanted cos and sin ", q_in.dtype(), " (", B, " or 1, ", T, ", ", 2 * half, "), got ",
                angle.dtype(), " ", angle.sizes());
  }
  const at::Tensor cos = cos_in.expand({B, T, 2 * half}).contiguous(), sin = sin_in.expand_as(cos).contiguous();
  const Heads both[] = {Heads(q_in), Heads(k_in)};
  AT_DISPATCH_FLOATING_TYPES(q_in.scalar_type(), "rotary", [&] {
    using Vec = at::vec::Vectorized<scalar_t>;
    const scalar_t *cos_data = cos.const_data_ptr<scalar_t>(), *sin_data = sin.const_data_ptr<scalar_t>();
    const scalar_t* in[] = {both[0].x.const_data_ptr<scalar_t>(), both[1].x.const_data_ptr<scalar_t>()};
    scalar_t* out[] = {both[0].y.mutable_data_ptr<scalar_t>(), both[1].y.mutable_data_ptr<scalar_t>()};
    const int64_t row = 2 * half * (q_in.size(1) + k_in.size(1));
    at::parallel_for(0, B * T, grain_of_rows(row), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t *c = cos_data + i * 2 * half, *s = sin_data + i * 2 * half;
        for (int which = 0; which < 2; ++which) {
          const at::Tensor &x = both[which].x, &y = both[which].y;
          for (int64_t h = 0; h < x.size(1); ++h) {
            const scalar_t* x_h = in[which] + i / T * x.stride(0) + h * x.stride(1) + i % T * x.stride(2);
            scalar_t* y_h = out[which] + i / T * y.stride(0) + h * y.stride(1) + i % T * y.stride(2);
            for (int64_t j = 0; j < half; j += Vec::size()) {
              const int64_t n = std::min<int64_t>(Vec::size(), half - j);
              const Vec x1 = Vec::loadu(x_h + j, n), x2 = Vec::loadu(x_h + half + j, n);
              const Vec c1 = Vec::loadu(c + j, n), c2 = Vec::loadu(c + half + j, n);
              const Vec s1 = Vec::loadu(s + j, n), s2 = Vec::loadu(s + half + j, n);
              (back ? x1 * c1 + x2 * s2 : x1 * c1 - x2 * s1).store(y_h + j, n);
              (back ? x2 * c2 - x1 * s1 : x2 * c2 + x1 * s2).store(y_h + half + j, n);
            }
          }
        }
      }
    });
  });
  return {both[0].y, both[1].y};
}

}  // namespace

TORCH_LIBRARY_IMPL(ddpo, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_bwd", rms_norm_bwd);
  m.impl("silu_mul", silu_mul);
  m.impl("silu_mul_bwd", silu_mul_bwd);
  m.impl("rotary", rotary);
}

}  // namespace ddpo

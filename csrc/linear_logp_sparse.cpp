// linear_logp with a frozen head where small probabilities are not multiplied one by one.
// Spec: ddpo/reference.py::linear_logp; what is approximate is row[n] alone, logp is exact.
//
//   row[n] = f[n,y] W[y] - sum_{v kept} p f W[v] - sum over blocks b of t[n,b] * mean[s,b]
//   kept:       p f > drop_below (by the sum so far, so never fewer)
//   t[n,b]      = sum of p f over the block's dropped v
//   mean[s,b]   = the block's head rows averaged with the dropped p f summed over the rows of n's segment s
//
// A segment is one sequence: its rows share one upstream coefficient, so the sum of its rows' tails is nearly exact
// for any loss, and no segment depends on its neighbours. Everything happens while the head block lies in cache:
// the product that gives the logits has just read it. Letters as in walk.h; S segments.
#include "walk.h"

namespace ddpo {
namespace {

constexpr int64_t kGroup = 64;        // entries looked at together for one above the threshold
constexpr int64_t kTailBlock = 1024;  // head rows that share a mean row; fixed, so that it depends on no batch

// Chunks of whole segments of about kRows rows: what a segment gets never depends on its neighbours.
std::vector<int64_t> whole_segments(const at::Tensor& segments) {
  const int64_t* ends = segments.const_data_ptr<int64_t>();
  std::vector<int64_t> offsets{0};
  for (int64_t s = 1; s < segments.numel(); ++s) {
    if (ends[s] - offsets.back() > kRows && ends[s - 1] > offsets.back()) offsets.push_back(ends[s - 1]);
  }
  offsets.push_back(segments[-1].item<int64_t>());
  return offsets;
}

template <typename T>
void axpy(T* out, T a, const T* x, int64_t D) {
  using Vec = at::vec::Vectorized<T>;
  const Vec a_vec(a);
  int64_t d = 0;
  for (; d + Vec::size() <= D; d += Vec::size()) {
    at::vec::fmadd(a_vec, Vec::loadu(x + d), Vec::loadu(out + d)).store(out + d);
  }
  for (; d < D; ++d) out[d] += a * x[d];
}

// Adds the kept entries of a row's block to its sums and zeroes them; returns what is left of the block.
template <typename T>
T take_kept(T* e, int64_t B, T threshold, const T* block, T* out, int64_t D) {
  using Vec = at::vec::Vectorized<T>;
  Vec left(0);
  T rest = 0;
  for (int64_t start = 0; start < B; start += kGroup) {
    const int64_t stop = std::min(start + kGroup, B);
    const T top = at::vec::reduce_all<T>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, e + start, stop - start);
    if (top > threshold) {
      for (int64_t v = start; v < stop; ++v) {
        if (e[v] > threshold) {
          axpy(out, e[v], block + v * D, D);
          e[v] = 0;
        }
      }
    }
    int64_t v = start;
    for (; v + Vec::size() <= stop; v += Vec::size()) left = left + Vec::loadu(e + v);
    for (; v < stop; ++v) rest += e[v];
  }
  return rest + at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, left);
}

// -> logp (N,), rows (N, D) in hidden's dtype
std::tuple<at::Tensor, at::Tensor> linear_logp_sparse_fwd(
    const at::Tensor& hidden, const at::Tensor& head, const at::Tensor& targets,
    const std::optional<at::Tensor>& bias_in, double scale, std::optional<double> softcap,
    const at::Tensor& segments, double drop_below) {
  const Plain plain;
  check(hidden, head, targets, bias_in);
  TORCH_CHECK(segments.dim() == 1 && segments.scalar_type() == at::kLong && segments.is_contiguous() &&
                  segments.numel() > 1 && segments[0].item<int64_t>() == 0 &&
                  segments[-1].item<int64_t>() == hidden.size(0) && (segments.diff() >= 0).all().item<bool>(),
              "linear_logp: segments must be contiguous int64 (S+1,) row offsets that rise from 0 to ", hidden.size(0));
  const Walk walk(hidden, head, whole_segments(segments), kTailBlock);
  const auto options = walk.hidden.options();
  const int64_t N = walk.N, D = walk.D;
  const std::optional<at::Tensor> bias = bias_in ? std::optional(bias_in->to(options).contiguous()) : std::nullopt;
  at::Tensor logp = at::empty({N}, options), out = at::zeros({N, D}, options);
  if (!N) return {logp, out.to(hidden.scalar_type())};
  const at::Tensor own = head.index_select(0, targets).to(options);  // (N, D) W[y]
  const at::Tensor first = (walk.hidden * own).sum(1);               // (N,) h.W[y]: a first bound of the log-sum-exp
  const at::Tensor segment_of = at::repeat_interleave(segments.diff());  // (N,)
  const int64_t *y = targets.const_data_ptr<int64_t>(), *seg = segment_of.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "linear_logp_sparse_fwd", [&] {
    const Logits<scalar_t> logits = logits_of<scalar_t>(bias, scale, softcap);
    std::vector<RowState<scalar_t>> rows(N);
    std::vector<scalar_t> tail(N), weight(N), bound(N);
    for (int64_t i = 0; i < N; ++i) {
      scalar_t z = first.const_data_ptr<scalar_t>()[i];
      logits.apply(&z, y[i], 1);
      bound[i] = z;
    }
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    walk.each([&](int64_t v0, const at::Tensor& block, int64_t row0, const at::Tensor&, at::Tensor& z) {
      const int64_t n = z.size(0), B = z.size(1);
      const scalar_t* block_data = block.template const_data_ptr<scalar_t>();
      scalar_t* z_data = z.template mutable_data_ptr<scalar_t>();
      const int64_t s0 = seg[row0], num_s = seg[row0 + n - 1] - s0 + 1;
      forward_block(z_data, n, B, v0, y + row0, logits, rows.data() + row0, out_data + row0 * D, D);
      at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const RowState<scalar_t>& row = rows[row0 + i];
          const scalar_t sum = std::max(row.sum, std::exp(bound[row0 + i] - row.max));
          tail[row0 + i] = take_kept(z_data + i * B, B, scalar_t(drop_below) * sum, block_data,
                                     out_data + (row0 + i) * D, D);
          weight[row0 + i] = 1 / sum;
        }
      });
      at::Tensor dropped = at::zeros({num_s, B}, options);  // p f of each segment's dropped entries, summed over rows
      scalar_t* dropped_data = dropped.template mutable_data_ptr<scalar_t>();
      at::parallel_for(0, (B + kGroup - 1) / kGroup, 1, [&](int64_t begin, int64_t end) {
        const int64_t from = begin * kGroup, width = std::min(end * kGroup, B) - from;
        for (int64_t i = 0; i < n; ++i) {
          axpy(dropped_data + (seg[row0 + i] - s0) * B + from, weight[row0 + i], z_data + i * B + from, width);
        }
      });
      const at::Tensor mass = dropped.sum(1, true).clamp_min_(std::numeric_limits<scalar_t>::min());
      const at::Tensor mean = at::mm(dropped, block).div_(mass);  // (num_s, D)
      const scalar_t* mean_data = mean.template const_data_ptr<scalar_t>();
      at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = row0 + begin; i < row0 + end; ++i) axpy(out_data + i * D, tail[i], mean_data + (seg[i] - s0) * D, D);
      });
    });
    finish(rows, logits, own, logp, static_cast<scalar_t*>(nullptr), out);
  });
  return {logp, out.to(hidden.scalar_type())};
}

}  // namespace
}  // namespace ddpo

TORCH_LIBRARY_IMPL(ddpo, CPU, m) { m.impl("linear_logp_sparse_fwd", &ddpo::linear_logp_sparse_fwd); }

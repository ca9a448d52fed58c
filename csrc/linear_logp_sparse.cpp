// linear_logp where small probabilities are not multiplied one by one, with the head frozen or trained.
// Spec: ddpo/reference.py::linear_logp; logp is exact, the gradients are approximate in the dropped terms alone.
//
//   row[n]     = d logp[n] / d h[n] = f[n,y] W[y] - sum_{v kept} p f W[v] - sum over blocks b of t[n,b] * mean[s,b]
//   d head[v]  = sum_n c[n] (1[v = y] f - p f) h[n]:  kept terms one by one, the others as share[s,v] * H[s,b]
//   kept:        p f > drop_below (by the sum so far, so never fewer);   f = 1 - (z/softcap)^2, times scale at the end
//   t[n,b]       = sum of p f over the block's dropped v
//   share[s,v]   = the dropped p f of v summed over the rows of segment s, over the same sum of the whole block
//   mean[s,b]    = sum_v share[s,v] W[v];   H[s,b] = sum_n c[n] t[n,b] h[n] over the rows n of segment s
//
// Both corrections are the same rank-one tail: row n spreads its t[n,b] over the block's ids as its segment does. A
// segment is one sequence, so none depends on its neighbours here, and where its rows share one coefficient c the
// c-weighted sum of its tails is nearly exact for any loss (exact but for p f being taken by the sum so far).
// Everything in the forward pass happens while the head block lies in cache. Letters as in walk.h; S segments.
#include "walk.h"

namespace ddpo {
namespace {

constexpr int64_t kGroup = 64;        // entries looked at together for one above the threshold
constexpr int64_t kTask = 8;          // rows of a task, whatever the number of threads
constexpr int64_t kMostKept = 16;     // a flat softmax keeps nearly all: at V / kMostKept a row the list is given up
constexpr int64_t kTailBlock = 1024;  // head rows that share a mean row; fixed, so that it depends on no batch

template <typename T>
struct Kept {
  int32_t id, row;  // id within its block
  T value;          // p f, at first relative to the row's sum so far
};

// Adds the kept entries of a row's block to its sums, zeroes them, and lists them where asked; returns what is left.
template <typename T>
T take_kept(T* e, int64_t B, T threshold, const T* block, T* out, int64_t D, int64_t row, std::vector<Kept<T>>* list) {
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
          if (list) list->push_back({int32_t(v), int32_t(row), e[v]});
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

// The kept entries of the whole walk, by id and then by row: what the head's gradient needs of the forward pass.
template <typename T>
struct ById {
  std::vector<int64_t> ends;  // (V,) of each id's entries
  std::vector<Kept<T>> entries;

  // takes in the lists of a block, whose rows rise, and empties them
  void add(std::vector<std::vector<Kept<T>>>& lists, int64_t B) {
    std::vector<int64_t> next(B, 0);
    for (const auto& list : lists) {
      for (const Kept<T>& kept : list) ++next[kept.id];
    }
    int64_t at = entries.size();
    for (int64_t v = 0; v < B; ++v) {
      const int64_t count = next[v];
      next[v] = at;
      ends.push_back(at += count);
    }
    entries.resize(at);
    for (auto& list : lists) {
      for (const Kept<T>& kept : list) entries[next[kept.id]++] = kept;
      list.clear();
    }
  }
};

void check_segments(const at::Tensor& segments, int64_t N) {
  TORCH_CHECK(segments.dim() == 1 && segments.scalar_type() == at::kLong && segments.is_contiguous() &&
                  segments.numel() > 1 && segments[0].item<int64_t>() == 0 &&
                  segments[-1].item<int64_t>() == N && (segments.diff() >= 0).all().item<bool>(),
              "linear_logp: segments must be contiguous int64 (S+1,) row offsets that rise from 0 to ", N);
}

// -> logp (N,), rows (N, D) in hidden's dtype; where the head is trained, for its gradient: slope (N,) of the target,
//    ends (V,), kept_rows (K,) and kept (K,) by id, tail (V/1024, N), share (S, V), and the log-sum-exps lse (N,), by
//    which to recompute where too many were kept and ends is -1; else those are empty
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                           at::Tensor, at::Tensor>;

Forward linear_logp_sparse_fwd(const at::Tensor& hidden, const at::Tensor& head, const at::Tensor& targets,
                               const std::optional<at::Tensor>& bias_in, double scale, std::optional<double> softcap,
                               const at::Tensor& segments, double drop_below, bool head_trained) {
  const Plain plain;
  check(hidden, head, targets, bias_in);
  check_segments(segments, hidden.size(0));
  const Walk walk(hidden, head, kTailBlock);
  const auto options = walk.hidden.options();
  const int64_t N = walk.N, D = walk.D, V = walk.V, S = segments.numel() - 1, num_blocks = (V + walk.B - 1) / walk.B;
  const std::optional<at::Tensor> bias = bias_in ? std::optional(bias_in->to(options).contiguous()) : std::nullopt;
  at::Tensor logp = at::empty({N}, options), out = at::zeros({N, D}, options);
  at::Tensor slope = at::empty({head_trained ? N : 0}, options), tail = at::empty({num_blocks, N}, options);
  at::Tensor share = at::zeros({head_trained ? S : 0, V}, options), dropped = at::empty({S, walk.B}, options);
  at::Tensor ends, kept_rows, kept, lse = at::empty({head_trained ? N : 0}, options);
  const at::Tensor own = head.index_select(0, targets).to(options);      // (N, D) W[y]
  const at::Tensor first = (walk.hidden * own).sum(1);                   // (N,) h.W[y]: a first bound of the log-sum-exp
  const at::Tensor segment_of = at::repeat_interleave(segments.diff());  // (N,)
  const int64_t *y = targets.const_data_ptr<int64_t>(), *seg = segment_of.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "linear_logp_sparse_fwd", [&] {
    using Entry = Kept<scalar_t>;
    const Logits<scalar_t> logits = logits_of<scalar_t>(bias, scale, softcap);
    std::vector<RowState<scalar_t>> rows(N);
    std::vector<scalar_t> weight(N), bound(N), max_then(head_trained ? num_blocks * N : 0);
    for (int64_t i = 0; i < N; ++i) {
      scalar_t z = first.const_data_ptr<scalar_t>()[i];
      logits.apply(&z, y[i], 1);
      bound[i] = z;
    }
    ById<scalar_t> by_id;
    bool listing = head_trained;
    std::vector<std::vector<Entry>> lists;  // of the block under way: a task of kTask rows each
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    const auto one_chunk = [&](int64_t v0, const at::Tensor& block, int64_t row0, const at::Tensor&, at::Tensor& z) {
      const int64_t n = z.size(0), B = z.size(1), tasks = (n + kTask - 1) / kTask;
      const scalar_t* block_data = block.template const_data_ptr<scalar_t>();
      scalar_t* z_data = z.template mutable_data_ptr<scalar_t>();
      scalar_t* tail_b = tail.mutable_data_ptr<scalar_t>() + v0 / walk.B * N;
      const size_t list0 = row0 == 0 ? 0 : lists.size();
      if (listing) lists.resize(list0 + tasks);
      at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kTask; i < std::min(end * kTask, n); ++i) {
          const int64_t row = row0 + i;
          RowState<scalar_t>& state = rows[row];
          forward_row(z_data + i * B, B, v0, y[row], logits, state, out_data + row * D, D);
          const scalar_t sum = std::max(state.sum, std::exp(bound[row] - state.max));
          tail_b[row] = take_kept(z_data + i * B, B, scalar_t(drop_below) * sum, block_data, out_data + row * D, D, row,
                                  listing ? &lists[list0 + i / kTask] : nullptr);
          weight[row] = sum > 0 ? 1 / sum : scalar_t(0);  // 0: nothing yet, or not a number
          if (head_trained) max_then[v0 / walk.B * N + row] = state.max;
        }
      });
      at::Tensor sums = dropped.narrow(1, 0, B);  // p f of each segment's dropped entries, summed over its rows
      if (row0 == 0) sums.zero_();
      scalar_t* sums_data = sums.template mutable_data_ptr<scalar_t>();
      at::parallel_for(0, (B + kGroup - 1) / kGroup, 1, [&](int64_t begin, int64_t end) {
        const int64_t from = begin * kGroup, width = std::min(end * kGroup, B) - from;
        for (int64_t i = 0; i < n; ++i) {
          axpy(sums_data + seg[row0 + i] * walk.B + from, weight[row0 + i], z_data + i * B + from, width);
        }
      });
    };
    const auto after_block = [&](int64_t v0, const at::Tensor& block) {
      const int64_t B = block.size(0);
      at::Tensor sums = dropped.narrow(1, 0, B);
      sums.div_(sums.sum(1, true).clamp_min_(std::numeric_limits<scalar_t>::min()));
      const at::Tensor mean = at::mm(sums, block);  // (S, D)
      const scalar_t *mean_data = mean.template const_data_ptr<scalar_t>(),
                     *tail_b = tail.const_data_ptr<scalar_t>() + v0 / walk.B * N;
      at::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) axpy(out_data + i * D, tail_b[i], mean_data + seg[i] * D, D);
      });
      if (!head_trained) return;
      share.narrow(1, v0, B).copy_(sums);
      if (listing) by_id.add(lists, B);
      if (int64_t(by_id.entries.size()) > N * V / kMostKept) {
        listing = false;
        by_id = {};
        lists = {};
      }
    };
    if (N) walk.each(one_chunk, after_block);
    finish(rows, logits, N ? own : at::Tensor(), logp,
           head_trained ? lse.mutable_data_ptr<scalar_t>() : nullptr, out);
    if (!head_trained) return;
    // what was relative to the sum so far, relative to the whole sum
    scalar_t* tail_data = tail.mutable_data_ptr<scalar_t>();
    const auto factor = [&](int64_t b, int64_t row) {
      return std::exp(max_then[b * N + row] - rows[row].max) / rows[row].sum;
    };
    for (int64_t b = 0; N && b < num_blocks; ++b) {
      for (int64_t i = 0; i < N; ++i) tail_data[b * N + i] *= factor(b, i);
    }
    const int64_t num_kept = by_id.entries.size();
    by_id.ends.resize(V, listing ? 0 : -1);
    ends = at::empty({V}, targets.options());
    std::copy(by_id.ends.begin(), by_id.ends.end(), ends.mutable_data_ptr<int64_t>());
    kept_rows = at::empty({num_kept}, targets.options().dtype(at::kInt));
    kept = at::empty({num_kept}, options);
    for (int64_t v = 0, k = 0; num_kept && v < V; ++v) {
      for (; k < by_id.ends[v]; ++k) {
        const Entry& entry = by_id.entries[k];
        kept_rows.mutable_data_ptr<int32_t>()[k] = entry.row;
        kept.mutable_data_ptr<scalar_t>()[k] = entry.value * factor(v / walk.B, entry.row);
      }
    }
    for (int64_t i = 0; i < N; ++i) slope.mutable_data_ptr<scalar_t>()[i] = logits.slope(rows[i].target);
  });
  if (!head_trained) {
    ends = at::empty({0}, targets.options());
    kept_rows = at::empty({0}, targets.options().dtype(at::kInt));
    kept = at::empty({0}, options);
    tail = at::empty({0, 0}, options);
  }
  return {logp, out.to(hidden.scalar_type()), slope, ends, kept_rows, kept, tail, share, lse};
}

// The gradients of head and bias from what the forward pass kept; each empty unless wanted, in opmath precision.
std::tuple<at::Tensor, at::Tensor> linear_logp_sparse_bwd(
    const at::Tensor& hidden_in, const at::Tensor& targets, const at::Tensor& segments, const at::Tensor& upstream,
    double scale, const at::Tensor& slope, const at::Tensor& ends, const at::Tensor& kept_rows, const at::Tensor& kept,
    const at::Tensor& tail, const at::Tensor& share, bool want_head, bool want_bias) {
  const Plain plain;
  const auto options = kept.options();
  const at::Tensor hidden = hidden_in.to(options).contiguous(), minus_c = (upstream.to(options) * -scale).contiguous();
  const int64_t N = hidden.size(0), D = hidden.size(1), V = ends.size(0), S = share.size(0), num_blocks = tail.size(0);
  TORCH_CHECK(upstream.sizes() == at::IntArrayRef({N}), "linear_logp: upstream must be (N,) = (", N, ",), got ",
              upstream.sizes());
  const at::Tensor own = -minus_c * slope, tails = tail * minus_c;  // (N,); (num_blocks, N)
  at::Tensor grad_head = at::empty({want_head ? V : 0, D}, options), grad_bias = at::empty({want_bias ? V : 0}, options);
  at::Tensor sums = at::empty({S, num_blocks, want_head ? D : 0}, options);  // -H[s, b]
  at::Tensor masses = at::empty({S, num_blocks}, options);                   // the same of the ones
  for (int64_t s = 0; s < S; ++s) {
    const int64_t row0 = segments[s].item<int64_t>(), n = segments[s + 1].item<int64_t>() - row0;
    const at::Tensor mine = tails.narrow(1, row0, n);
    if (want_head) {
      at::Tensor sums_s = sums[s];
      at::mm_out(sums_s, mine, hidden.narrow(0, row0, n));
    }
    if (want_bias) masses[s].copy_(mine.sum(1));
  }
  const int64_t* end = ends.const_data_ptr<int64_t>();
  const int32_t* row = kept_rows.const_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES(options.dtype().toScalarType(), "linear_logp_sparse_bwd", [&] {
    const scalar_t *value = kept.const_data_ptr<scalar_t>(), *c_data = minus_c.const_data_ptr<scalar_t>(),
                   *hidden_data = hidden.const_data_ptr<scalar_t>();
    for (int64_t b = 0; b < num_blocks; ++b) {
      const int64_t v0 = b * kTailBlock, B = std::min(kTailBlock, V - v0);
      const at::Tensor spread = share.narrow(1, v0, B).t();  // (B, S)
      if (want_head) {
        at::Tensor mine = grad_head.narrow(0, v0, B);
        at::mm_out(mine, spread, sums.select(1, b));
      }
      if (want_bias) grad_bias.narrow(0, v0, B).copy_(at::mv(spread, masses.select(1, b)));
      scalar_t *head_data = grad_head.mutable_data_ptr<scalar_t>(), *bias_data = grad_bias.mutable_data_ptr<scalar_t>();
      at::parallel_for(v0, v0 + B, kGroup, [&](int64_t from, int64_t to) {
        for (int64_t v = from; v < to; ++v) {
          for (int64_t k = v ? end[v - 1] : 0; k < end[v]; ++k) {
            const scalar_t a = c_data[row[k]] * value[k];
            if (want_head) axpy(head_data + v * D, a, hidden_data + row[k] * D, D);
            if (want_bias) bias_data[v] += a;
          }
        }
      });
    }
  });
  if (want_head) grad_head.index_add_(0, targets, hidden * own.unsqueeze(1));
  if (want_bias) grad_bias.index_add_(0, targets, own);
  return {grad_head, grad_bias};
}

}  // namespace
}  // namespace ddpo

TORCH_LIBRARY_IMPL(ddpo, CPU, m) {
  m.impl("linear_logp_sparse_fwd", &ddpo::linear_logp_sparse_fwd);
  m.impl("linear_logp_sparse_bwd", &ddpo::linear_logp_sparse_bwd);
}

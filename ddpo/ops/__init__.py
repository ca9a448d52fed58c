"""One public function per op; checks here, arithmetic in the implementations behind it."""

from ddpo.ops.attention import packed_attention
from ddpo.ops.linear_logp import linear_logp
from ddpo.ops.preference import linear_preference
from ddpo.ops.sequence_sum import sequence_sum

__all__ = ["linear_logp", "linear_preference", "packed_attention", "sequence_sum"]

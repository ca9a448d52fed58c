from ddpo.deviation import distinct_k as distinct_k
from ddpo.deviation import log_det as log_det
from ddpo.deviation import mean_distance as mean_distance
from ddpo.deviation import nearest_distance as nearest_distance
from ddpo.deviation import vendi_score as vendi_score
from ddpo.deviation import weights as weights
from ddpo.fused import FusedLinearDDPOLoss as FusedLinearDDPOLoss
from ddpo.fused import FusedLinearDORPOLoss as FusedLinearDORPOLoss
from ddpo.fused import head_of as head_of
from ddpo.fused import preference_loss as preference_loss
from ddpo.fused import sequence_logp as sequence_logp
from ddpo.losses import ddpo as ddpo
from ddpo.losses import dorpo as dorpo
from ddpo.losses import dpo as dpo
from ddpo.losses import gvpo as gvpo
from ddpo.losses import ipo as ipo
from ddpo.losses import orpo as orpo
from ddpo.losses import sft as sft
from ddpo.losses import simpo as simpo
from ddpo.losses import spl as spl
from ddpo.ops import linear_logp as linear_logp
from ddpo.ops import linear_preference as linear_preference
from ddpo.ops import packed_attention as packed_attention
from ddpo.ops import sequence_sum as sequence_sum
from ddpo.weigh import weigh_dataset as weigh_dataset

__version__: str

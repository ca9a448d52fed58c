"""What a loss is a mean over: responses (SFT), pairs, or groups (GVPO); each holds some of a folder's responses."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ddpo.data.prepared import Prepared


@dataclass(frozen=True)
class Items:
    """Item i holds the responses members[offsets[i] : offsets[i + 1]]: a pair its chosen and its rejected one, a group
    all of its prompt's that have a score."""

    members: np.ndarray  # (M,) int64, responses of the prepared folder
    offsets: np.ndarray  # (I+1,) int64
    weight: np.ndarray  # (I,) float64: of a pair; others have 1

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def first(self) -> np.ndarray:
        """(I,) each item's first response: a pair's chosen one."""
        return self.members[self.offsets[:-1]]

    def responses(self, items: np.ndarray) -> np.ndarray:
        """The responses of these items, item after item."""
        size = self.sizes(items)
        shift = self.offsets[items] - (np.cumsum(size) - size)  # from a place in the result to one in members
        return self.members[np.repeat(shift, size) + np.arange(size.sum())]

    def sizes(self, items: np.ndarray) -> np.ndarray:
        """How many responses each of these items holds."""
        return self.offsets[items + 1] - self.offsets[items]

    def components(self, num_responses: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items sorted by the connected component of their responses, the components' offsets among them, and each
        response's component."""
        first = np.repeat(self.first, np.diff(self.offsets))  # an item ties its responses to its first one
        edges = coo_array((np.ones(len(first), bool), (first, self.members)), shape=(num_responses,) * 2)
        _, component = connected_components(edges, directed=False)
        items = np.argsort(component[self.first], kind="stable")
        changes = np.flatnonzero(np.diff(component[self.first][items])) + 1
        return items, np.concatenate([[0], changes, [len(items)]]), component


def items_of(data: Prepared, kind: str) -> Items:
    """kind: 'response', 'pair' or 'group'. Raises ValueError where the folder has none."""
    if kind == "pair":
        found = Items(data.pairs.reshape(-1), 2 * np.arange(len(data.pairs) + 1), data.weight)
        why, way = "scores equal or missing in every group?", "Prepare with another rule (--pairs all), or use"
    elif kind == "group":
        scored = np.flatnonzero(~np.isnan(data.scores))
        size = np.bincount(data.response_group[scored], minlength=len(data.groups))  # of each group
        members = scored[size[data.response_group[scored]] > 1]  # one response has nothing to be compared with
        found = Items(members, np.cumsum([0, *size[size > 1]]), np.ones((size > 1).sum()))
        why, way = "no prompt has two responses with a score.", "Use"
    else:
        num = len(data.responses)
        return Items(np.arange(num), np.arange(num + 1), np.ones(num))
    if not len(found):
        raise ValueError(f"{data.folder} has no {kind}s to learn from: {why} {way} --method sft")
    return found

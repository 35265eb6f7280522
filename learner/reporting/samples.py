"""One completion of a group as the bytes that are kept for playback.

Shapes: C completion positions, P prompt tokens, m denoising steps.
"""

from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save

from rollout.trajectory import TrajectoryGroup


def pack_trajectory(
    group: TrajectoryGroup,
    row: int,
    arrays: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """One completion as safetensors: the group's arrays of that row ([C], ``position_logp`` [m]) and ``prompt_ids``
    [P], under the names of ``TrajectoryGroup``, and ``arrays`` beside them; ``metadata`` goes into the header. Left out
    are positions that the completion doesn't have, and the support: playback doesn't need it, and at top-k 150 it is
    most of the bytes.
    """
    names = ["completion_ids", "unmask_step", "unmask_rank", "drawn", "logp", "logp_raw", "entropy"]
    there_C = group.there[row]
    tensors = {name: np.ascontiguousarray(getattr(group, name)[row, there_C]) for name in names}
    if group.position_logp is not None:
        tensors["position_logp"] = np.ascontiguousarray(group.position_logp[row])
    tensors["prompt_ids"] = np.ascontiguousarray(group.prompt_ids)
    tensors |= {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    return save(tensors, None if metadata is None else dict(metadata))

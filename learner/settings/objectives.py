"""``objective.*``: one variant for each method, told apart by ``objective.type``."""

from typing import Annotated

from pydantic import Field

from learner.settings.methods.bounds import (
    BgpoConfig,
    DmpoConfig,
    EspoConfig,
    GdpoConfig,
    RspoConfig,
    SpgConfig,
    TraflConfig,
)
from learner.settings.methods.branches import DispoConfig, EgspoConfig
from learner.settings.methods.matching import DtmConfig
from learner.settings.methods.one_step import CoupledGrpoConfig, DiffuGrpoConfig, Wd1Config
from learner.settings.methods.states import (
    AgrpoConfig,
    AgrpoFillsConfig,
    D2Config,
    DiffpoConfig,
    JustGrpoConfig,
    TraceRlConfig,
)

ObjectiveConfig = Annotated[
    AgrpoConfig
    | AgrpoFillsConfig
    | DiffuGrpoConfig
    | Wd1Config
    | CoupledGrpoConfig
    | EspoConfig
    | GdpoConfig
    | SpgConfig
    | BgpoConfig
    | DmpoConfig
    | RspoConfig
    | TraflConfig
    | DtmConfig
    | D2Config
    | DiffpoConfig
    | TraceRlConfig
    | JustGrpoConfig
    | EgspoConfig
    | DispoConfig,
    Field(discriminator="type"),
]

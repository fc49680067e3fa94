"""Types of parameters: numbers with their ranges, and names.

The bounds are far beyond what anybody needs. What exceeds them is a slip, and would end in an overflow, in an
allocation of all memory or in a loop without end.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, FiniteFloat, StringConstraints

from sfgrpo.config.names import checked_model_name, checked_new_alias, checked_run_id

UnitInterval = Annotated[float, Ge(0), Le(1)]
Fraction = Annotated[float, Ge(0), Lt(1)]
GuidanceScale = Annotated[float, Ge(1)]

Seed = Annotated[int, Ge(0), Lt(2**32)]
"""What every generator of every library takes, also multiplied by a million or counted up."""
Edition = Annotated[int, Ge(0), Lt(2**31)]
Count = Annotated[int, Gt(0), Le(10**9)]
CountOrZero = Annotated[int, Ge(0), Le(10**9)]
PromptCount = Annotated[int, Gt(0), Le(10**7)]
PromptCountOrZero = Annotated[int, Ge(0), Le(10**7)]
ImageCount = Annotated[int, Gt(0), Le(10**6)]
"""Images, or their prompts, that are in memory together."""
ResampleCount = Annotated[int, Gt(0), Le(10**6)]
StepCount = Annotated[int, Gt(0), Le(1000)]
"""Steps from noise to image; the noise levels of diffusers' schedulers are 1000."""
StepIndex = Annotated[int, Ge(0), Le(1000)]
Width = Annotated[int, Gt(0), Le(2**14)]
"""A dimension of a weight, or the pixels of a side."""
TokenCount = Annotated[int, Ge(0), Le(512)]
"""512 is what the SD3 pipeline takes, by which a registered version draws."""
ProcessCount = Annotated[int, Gt(0), Le(1024)]
VersionNumber = Annotated[int, Gt(0), Lt(2**31)]
"""What MLflow's databases hold."""
Duration = Annotated[FiniteFloat, Ge(0), Le(10**6)]
"""Seconds, hours or days; a million seconds are eleven days, and more overflows some clocks."""
Guidance = Annotated[FiniteFloat, Ge(0), Le(1000)]
"""Weight that a version draws with; below 1 the pipeline does without guidance."""

Name = Annotated[str, MinLen(1)]
ModelName = Annotated[str, AfterValidator(checked_model_name)]
NewAlias = Annotated[str, AfterValidator(checked_new_alias)]
RunId = Annotated[str, AfterValidator(checked_run_id)]
RunName = Annotated[str, StringConstraints(pattern="^train-[0-9a-f]{1,64}$")]
"""Name of a training's folder."""

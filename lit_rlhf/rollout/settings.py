"""What a rollout is made of, in a frozen dataclass that checks itself."""

from dataclasses import dataclass, replace

from lit_rlhf.errors import UserError, require, require_types
from lit_rlhf.rollout.play import GenerationSettings


@dataclass(frozen=True)
class RolloutSettings:
    """How many episodes, how long, and in which order; the arguments of `RolloutDataModule` say what each means."""

    rollout_size: int
    num_slots: int
    max_tokens: int | None
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    max_validation_prompts: int
    seed: int
    group_size: int = 1

    def __post_init__(self) -> None:
        """Refuse counts below 1, and an empty text, which every response holds."""
        require_types(type(self), vars(self))
        for name in ("rollout_size", "num_slots", "max_new_tokens", "max_validation_prompts"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.group_size >= 1, "group_size", self.group_size, "1 or more completions of each prompt")
        if self.rollout_size % self.group_size:
            raise UserError(
                f"rollout_size ({self.rollout_size}) must be a multiple of group_size ({self.group_size}); "
                f"try {-(-self.rollout_size // self.group_size) * self.group_size}"
            )
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more, or null")
        require(all(self.stop_strings), "stop_strings", self.stop_strings, "texts, none of them empty")
        require(self.seed >= 0, "seed", self.seed, "0 or more")

    def bound(self, generation: GenerationSettings) -> GenerationSettings:
        """How responses are generated, within the limits of a rollout."""
        stops, slots = self.stop_strings, self.num_slots
        return replace(generation, max_new_tokens=self.max_new_tokens, stop_strings=stops, num_slots=slots)

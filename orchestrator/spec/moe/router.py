"""The `model.router` section: how routers score experts, and how many of them a token visits."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from orchestrator.spec.keys.section import Broken, Path, Section, broken_unread, refuse

LEAST_CAPACITY = 0.5


class RouterSpec(Section):
    """Routers of our MoE layers. What their scores are made of is `scoring_func`, above."""

    scorer: Literal["linear", "attention", "context"] = Field(
        default="linear",
        description="linear: a vector per expert. attention: a query made from the token, and a key per expert, of "
        "width rank; an export has the equal linear router. context: several heads of such, whose queries also come "
        "from what attention has brought the token from earlier ones; no export has it.",
    )
    rank: int = Field(default=16, ge=1, description="Of attention and context: width of queries and keys.")
    num_heads: int = Field(default=4, ge=1, description="Of context: its heads.")
    selection: Literal["top_k", "top_p", "expert_choice"] = Field(
        default="top_k",
        description="top_k: a token visits its num_experts_per_tok best experts. top_p: as many of the best as it "
        "takes to reach a share of its scores, by which tokens visit num_experts_per_tok on average. expert_choice: "
        "each expert takes its best tokens of a micro-batch; not for generate and export, as it sees later tokens.",
    )
    max_experts_per_tok: int | None = Field(
        default=None,
        ge=2,
        description="Of top_p: experts that a token visits at most. null: twice num_experts_per_tok, or all.",
    )
    capacity_factor: float | None = Field(
        default=None,
        gt=0,
        description="In training, tokens that an expert takes of a micro-batch at most, over an equal share; at least "
        "0.5. Those that score lowest for it are dropped: they do without it. null: none is dropped. With a small "
        "factor experts are equally busy, and more is dropped.",
    )

    @property
    def compares_tokens(self) -> dict[str, object]:
        """Keys by which what a token visits depends on the other tokens of its micro-batch, with their values."""
        by_choice = {"selection": self.selection} if self.selection == "expert_choice" else {}
        return by_choice | ({} if self.capacity_factor is None else {"capacity_factor": self.capacity_factor})

    def broken_rules(self) -> Iterator[Broken]:
        used_by = {"rank": ("attention", "context"), "num_heads": ("context",)}
        yield from broken_unread(self, "scorer", {self.scorer}, used_by)
        used_by = {"max_experts_per_tok": ("top_p",), "capacity_factor": ("top_k", "top_p")}
        yield from broken_unread(self, "selection", {self.selection}, used_by)
        if self.capacity_factor is not None and self.capacity_factor < LEAST_CAPACITY:
            rule = f"capacity_factor must be at least {LEAST_CAPACITY}, or more is dropped than kept; got "
            yield Broken((("capacity_factor",),), f"{rule}{self.capacity_factor:g}")


def most_experts(router: RouterSpec, top_k: int, num_experts: int) -> int:
    """Experts that a token visits at most.

    Args:
        top_k: experts that tokens visit, on average where that varies.
    """
    match router.selection:
        case "top_k":
            return top_k
        case "top_p":
            return min(router.max_experts_per_tok or 2 * top_k, num_experts)
    return num_experts


def broken_router(router: RouterSpec, top_k: int, num_experts: int, num_groups: int) -> Iterator[Broken]:
    """The rules between a router and the sizes of a mixture."""
    selection = ("router", "selection")
    if router.selection != "top_k" and num_groups > 1:
        yield Broken((selection, ("n_group",)), f"router.selection must be top_k with groups; got {router.selection}")
    if router.selection != "top_p":
        return
    most = most_experts(router, top_k, num_experts)
    if not 2 <= top_k < most:
        rule = (
            "with router.selection top_p, num_experts_per_tok must be at least 2 and below the experts that a token "
            f"visits at most; got {top_k} and {most}"
        )
        most_key = ("router", "max_experts_per_tok")
        keys: tuple[Path, ...] = (("num_experts_per_tok",), most_key, selection, ("n_routed_experts",))
        yield Broken(keys, rule)
    if (router.max_experts_per_tok or 0) > num_experts:
        rule = f"router.max_experts_per_tok must be at most n_routed_experts; got {router.max_experts_per_tok}"
        yield Broken((("router", "max_experts_per_tok"), ("n_routed_experts",)), rule)


def _router(value: Any) -> Any:
    """Expand the short form: the name of a scorer."""
    if value in ("sigmoid", "softmax"):  # as this key had them once
        raise refuse(f"must be a scorer or a mapping; {value} is a value of model.scoring_func now")
    return {"scorer": value} if isinstance(value, str) else value


Router = Annotated[RouterSpec, BeforeValidator(_router, json_schema_input_type=str | RouterSpec)]

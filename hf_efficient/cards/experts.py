"""What a checkpoint's card says about sparse experts, from the upcycling report and the config."""

from __future__ import annotations

from typing import Any

from hf_efficient.cards.markdown import table

TAG = "sparse-experts"
PAPERS = {
    "Sparse upcycling": ("Komatsuzaki et al. 2023", "2212.05055"),
    "Switch Transformers": ("Fedus et al. 2022", "2101.03961"),
}


def experts_words(experts: dict[str, Any]) -> str:
    """One phrase for a heading."""
    return f"sparse experts: {experts['num_experts']} in a layer, {experts['top_k']} for each token"


def experts_section(experts: dict[str, Any], report: dict[str, Any] | None, not_recorded: str) -> str:
    """The table of a model's experts.

    Args:
        experts: their options. report: the upcycling report, if there is one.
        not_recorded: what stands for a figure without it.
    """
    capacity = experts["capacity_factor"]
    share = f"{experts['top_k']} · T / {experts['num_experts']}"
    dropped = "none" if capacity is None else f"those beyond {capacity} times its even share, {share} of T tokens"
    rows = [
        ["experts in a sparse layer", str(experts["num_experts"])],
        ["experts of a token", str(experts["top_k"])],
        ["tokens that an expert drops in training", dropped],
        ["weight of the load balance", str(experts["router_aux_loss_coef"])],
        ["weight of the z-loss", str(experts["router_z_loss_coef"])],
    ]
    at_start = "outputs at the start, in eval mode"
    names = ("sparse layers", "parameters as upcycled", "of these met by one token", at_start)
    recorded = dict.fromkeys(names, not_recorded)
    if report is not None:
        recorded = {
            "sparse layers": ", ".join(f"`{name}`" for name in report["layers"]),
            "parameters as upcycled": f"{report['parameters']}, of the source: {report['source_parameters']}",
            "of these met by one token": str(report["active_parameters"]),
            at_start: f"differ from the source's by {report['difference']:.4g} of the largest; allowed were "
            f"{report['tolerance']:.4g}",
        }
    return table(["experts", "value"], rows + [list(item) for item in recorded.items()])


def experts_limits(experts: dict[str, Any]) -> list[str]:
    """What users of experts must know."""
    limits = [
        "All experts must be in memory, though a token meets few of them.",
        "`hf-efficient revert` gives dense layers back only until the experts are trained apart.",
    ]
    if experts["capacity_factor"] is not None:
        limits.append("Dropped tokens get nothing from their layer in training; at inference none is dropped.")
    return limits

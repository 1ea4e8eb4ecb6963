"""What is measured of an untrained model to predict how much Adam gains over SGD (protocol 2).

One reading each, fixed before any result was seen; docs/predictors.md has the table, what each was
checked against and what was amended. Importing this takes no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAMILIES", "PREDICTORS", "Predictor", "Value"]

# What is measured together, in the order of the cost.
FAMILIES = ("problem", "spectrum", "gradient", "blocks", "full")


@dataclass(frozen=True)
class Predictor:
    """A measure at initialisation.

    Attributes:
        name: Its name in table `predictors`.
        label: Its place in the list of protocol 2; the primary one is J, dummies are 0.
        what: What it is, in one line.
        source: Where the definition comes from.
        family: What it is measured together with, one of FAMILIES.
        direction: +1 if a larger value should mean that Adam is needed more, else −1.
        num_products: Products with each block.
        num_full_products: Products with the whole Hessian, at most.
    """

    name: str
    label: str
    what: str
    source: str
    family: str
    direction: int = 1
    num_products: int = 0
    num_full_products: int = 0

    @property
    def needs(self) -> str:
        """What it costs, in words."""
        if self.family == "spectrum":
            return "a spectrum"
        if self.num_products:
            return f"{self.num_products} products a block"
        return f"{self.num_full_products} full products" if self.num_full_products else "none"


@dataclass(frozen=True)
class Value:
    """What a predictor is of one model on one batch.

    Attributes:
        value: The measure; None where it is not defined.
        standard_error: Over probes, where there is one.
        num_products: Products with each block.
        num_full_products: Products with the whole Hessian.
        reason: Why there is no value.
    """

    value: float | None
    standard_error: float | None = None
    num_products: int = 0
    num_full_products: int = 0
    reason: str | None = None


_ZHANG = "Zhang et al. 2024, arXiv 2402.16788"
_PAN = "Pan & Li 2023, arXiv 2306.00204"
_TOMIHARI = "Tomihari & Sato 2025, arXiv 2502.00213"
PREDICTORS = (
    Predictor(
        "js0_raw",
        "J",
        "Jensen-Shannon distance between the blocks' raw eigenvalues",
        f"{_ZHANG}, section 2.2, normalised",
        "spectrum",
    ),
    Predictor(
        "js0_own_rms",
        "J'",
        "the same of eigenvalues over their block's rms",
        "a reading of ours",
        "spectrum",
    ),
    Predictor(
        "js0_lambda10",
        "J'",
        "the same of eigenvalues over their block's 10th largest",
        "protocol 1",
        "spectrum",
    ),
    Predictor(
        "energy_js",
        "E",
        "Jensen-Shannon distance between the blocks' distributions of log |λ| weighted by λ²",
        "new here",
        "spectrum",
    ),
    Predictor(
        "lambda_rms_spread",
        "1",
        "spread over blocks of log10 rms eigenvalue",
        f"after {_ZHANG}, section 3",
        "blocks",
        num_products=3,
    ),
    Predictor(
        "lambda_max_spread",
        "2",
        "spread over blocks of log10 largest |eigenvalue|",
        f"after {_ZHANG}, section 3",
        "blocks",
        num_products=10,
    ),
    Predictor(
        "gradient_rms_spread",
        "3",
        "spread over blocks of log10 rms gradient",
        f"after {_TOMIHARI}",
        "gradient",
    ),
    Predictor(
        "gradient_rms_gini",
        "3",
        "Gini coefficient over blocks of the rms gradient",
        _TOMIHARI,
        "gradient",
    ),
    Predictor(
        "sign_sharpness",
        "4",
        "curvature along the sign of the gradient",
        _PAN,
        "full",
        direction=-1,
        num_full_products=1,
    ),
    Predictor(
        "sharpness_contrast",
        "4",
        "how much the curvature along the gradient is above that along its sign",
        f"after {_PAN}",
        "full",
        num_full_products=2,
    ),
    Predictor(
        "gradient_density",
        "5",
        "density of the gradient, ‖g‖₁² / (d ‖g‖₂²)",
        "Bernstein et al. 2018, arXiv 1802.04434",
        "gradient",
    ),
    Predictor(
        "linf_smoothness",
        "6",
        "‖H‖₁,₁ / d over the largest |eigenvalue|",
        "Xie, Mohamadi & Li 2025, arXiv 2410.08198",
        "full",
        direction=-1,
        num_full_products=80,
    ),
    Predictor(
        "diagonal_ratio",
        "7",
        "largest over median |entry| of the Hessian's diagonal",
        "Jiang, Malik & Li 2023, arXiv 2211.02254",
        "full",
        num_full_products=10,
    ),
    Predictor(
        "label_imbalance",
        "8",
        "ln C − H of the targets",
        "after Kunstner et al. 2024, arXiv 2402.19449",
        "problem",
    ),
    Predictor(
        "noise_share",
        "9",
        "part of a training batch's squared gradient that is noise",
        "after McCandlish et al. 2018, arXiv 1812.06162; Srećković et al. 2025, arXiv 2506.12543",
        "gradient",
        direction=-1,
    ),
    Predictor("has_attention", "0", "1 with attention, else 0", "a dummy", "problem"),
    Predictor("log_params", "0", "log10 of the number of parameters", "a dummy", "problem"),
    Predictor(
        "log_classes",
        "0",
        "log10 of the number of classes",
        "Dong et al. 2025, arXiv 2505.02809",
        "problem",
    ),
)

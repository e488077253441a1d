"""What is minimised: pure functions `loss(model, frozen, batch, rng, compute) -> (loss_sum, weight, metrics)`."""

from panda_jax.objectives import causal

# name in the configuration -> loss
OBJECTIVES = {
    "causal": causal.loss,
}

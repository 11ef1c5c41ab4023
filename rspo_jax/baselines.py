"""The other objectives, over the same arrays as RSPO's.

Each is a function (Terms, ObjectiveSettings) -> (loss [N], metrics): the mean
of loss over kept sequences is what is minimised. Entries of `OBJECTIVES`
(objectives.py) say which advantages each takes and what else it needs.

Notation. lp: row log-probs f32 [N, U, R] (per token); s: scores f32 [N, K],
nats per token; E = L s; old: the same under the parameters that sampled, or
the policy itself, stopped; C(rho, A) = min(rho A, clip(rho, 1 - e, 1 + e) A).

Where a published program is not at hand, the docstring says so; nothing here
claims to be a paper's setting. RFT lives in objectives.py. BGPO (arXiv
2510.11683) at one update a rollout is RSPO with lambda 0 and needs no entry.
"""

import jax
import jax.numpy as jnp

KL_REDUCTIONS = ("mean", "sum")
RATIO_NORMS = ("none", "length")
PAIRS = ("all", "extremes")
NEGATIVE_SCORES = ("mix", "eubo", "elbo", "none")


def mean(x, keep):
  """Mean of x [N] over kept sequences, 0 where none is kept."""
  return (x * keep).sum() / jnp.maximum(keep.sum(), 1.0)


def valid_rows(terms):
  """f32 [N, U, R]: 1 for rows that score a token."""
  return (terms.weight > 0).any(2).astype(jnp.float32)


def old_values(terms):
  """Values under the parameters of the rollout; the policy's own, stopped."""
  old = terms.policy if terms.old is None else terms.old
  return jax.lax.stop_gradient(old)


def clipped(ratio, advantage, settings):
  """min(rho A, clip(rho, 1 - e, 1 + e) A).

  On the edge of the region both are one: there the slope is that of rho A, so
  that with e = 0 a step on policy is the policy gradient.
  """
  low, high = 1.0 - settings.clip, 1.0 + settings.clip
  free, bound = ratio * advantage, jnp.clip(ratio, low, high) * advantage
  # `minimum` would share the slope of a tie among both, `clip` halve its part.
  return jnp.where(bound < free, jax.lax.stop_gradient(bound), free)


def k3(log_ratio):
  """exp(x) - 1 - x >= 0 of x = log(other / policy), an estimate of a KL."""
  return jnp.exp(log_ratio) - 1.0 - log_ratio


def _ratio_metrics(ratio, weight, settings):
  """How far the policy has left the rollout's; weight like ratio."""
  outside = jnp.abs(ratio - 1.0) > settings.clip
  total = jnp.maximum(weight.sum(), 1.0)
  return {
    "ratio/mean": (ratio * weight).sum() / total,
    "ratio/outside_share": (outside * weight).sum() / total,
  }


def _reference_metrics(terms):
  """Relative score of scores [N, K]."""
  d = (terms.policy - terms.reference).mean(-1)
  spread = jnp.square(d - mean(d, terms.keep))
  return {
    "score/policy_mean": mean(terms.policy.mean(-1), terms.keep),
    "score/relative_mean": mean(d, terms.keep),
    "score/relative_std": jnp.sqrt(mean(spread, terms.keep)),
  }


def diffu_grpo(terms, settings):
  """diffu-GRPO: GRPO on mean-field token log-probs (arXiv 2504.12216).

  L = sum_ij c_ij [-C(rho_ij, A_i) + beta k3(lp_ref - lp)] / sum_ij c_ij,
  rho_ij = exp(lp_ij - old_ij): a mean over the tokens of the batch. Source:
  the d1 program, diffu_grpo_trainer.py. A = r - group mean.
  """
  valid, advantage = valid_rows(terms), terms.advantage[:, None, None]
  ratio = jnp.exp(terms.policy - old_values(terms))
  per_token = -clipped(ratio, advantage, settings)
  if settings.kl_weight:
    reference = jax.lax.stop_gradient(terms.reference)
    per_token += settings.kl_weight * k3(reference - terms.policy)
  loss = (valid * per_token).sum((1, 2))
  weight = valid * terms.keep[:, None, None]
  return loss / jnp.maximum(terms.sizes.rows, 1.0), {
    "score/policy_mean": (weight * terms.policy).sum()
    / jnp.maximum(weight.sum(), 1.0),
    **_ratio_metrics(ratio, weight, settings),
  }


def wd1(terms, settings):
  """wd1: weighted log-likelihood, no ratio, no reference (arXiv 2507.08838).

  L = mean over prompts of sum_i (w-_i - w+_i) sum_j lp_ij, with w+ and w- the
  group's softmax of A and of -A. Source: rev_grpo_trainer.py. The advantage is
  G (w+ - w-), so that the mean over sequences is that over prompts.
  """
  del settings
  s = terms.policy.mean(-1)
  return -terms.advantage * terms.length * s, {
    "score/policy_mean": mean(s, terms.keep)
  }


def espo(terms, settings):
  """ESPO: a ratio of sequence ELBOs (arXiv 2512.03759).

  L = mean_i -C(exp((E - E_old) / L), A_i) + beta / L * 1/2 (E - E_ref)^2.
  Source: espo_trainer.py. A = r - mean of the others of the group. With one
  update a rollout its gradient is RSPO's without centring at
  lambda_token = L beta.
  """
  s, length = terms.policy.mean(-1), terms.length
  ratio = jnp.exp(s - old_values(terms).mean(-1))
  loss = -clipped(ratio, terms.advantage, settings)
  metrics = _ratio_metrics(ratio, terms.keep, settings)
  if settings.kl_weight:
    d = s - jax.lax.stop_gradient(terms.reference).mean(-1)
    loss += settings.kl_weight * 0.5 * length * jnp.square(d)
    metrics |= _reference_metrics(terms)
  return loss, metrics


def gdpo(terms, settings):
  """Group Diffusion PO: a ratio of quadrature ELBOs (arXiv 2510.08554).

  L = mean_i -(1 / L) C(exp(E - E_old), A_i) + beta k3. `ratio_norm="length"`
  divides E - E_old by L, and then the factor 1 / L goes. The estimator was
  read in a program (scheme gauss_floor), the objective in a note about the
  paper only. A = r - group mean. k3 is ours: of the ratio's own quantity.
  """
  length = jnp.maximum(terms.length, 1.0)
  by_length = settings.ratio_norm == "length"
  scale = 1.0 if by_length else length
  s = terms.policy.mean(-1)
  ratio = jnp.exp(scale * (s - old_values(terms).mean(-1)))
  loss = -clipped(ratio, terms.advantage, settings)
  if not by_length:
    loss = loss / length
  metrics = _ratio_metrics(ratio, terms.keep, settings)
  if settings.kl_weight:
    d = s - jax.lax.stop_gradient(terms.reference).mean(-1)
    loss += settings.kl_weight * k3(-scale * d)
    metrics |= _reference_metrics(terms)
  return loss, metrics


def group_pairs(advantage, keep, settings):
  """(winner, loser) of each pair of a group: f32 [B, G, G], [b, w, l].

  Every pair of a better and a worse reward, be both right or wrong (with
  rewards of 1 and 0: right against wrong), or the best against the worst (the
  first of each); none where rewards tie.
  """
  size = settings.group_size
  a = advantage.reshape(-1, size)
  kept = keep.reshape(-1, size)
  better = (a[:, :, None] > a[:, None, :]).astype(jnp.float32)
  better *= kept[:, :, None] * kept[:, None, :]
  if settings.pairs == "all":
    return better
  best = jax.nn.one_hot(jnp.argmax(a, -1), size)
  worst = jax.nn.one_hot(jnp.argmin(a, -1), size)
  return better * best[:, :, None] * worst[:, None, :]


def vrpo(terms, settings):
  """VRPO: preference optimisation on ELBOs (arXiv 2505.19223, LLaDA 1.5).

  L = -log sigmoid(beta [(E - E_ref)(w) - (E - E_ref)(l)]) - eta s(w), a mean
  over the pairs of a group and then over groups; the same masks for policy and
  reference. An adaptation: the paper trains on offline pairs, here they are
  pairs of the on-policy group, of which the reward says which is better
  (`group_pairs`); coefficients come from memory of the paper.
  """
  s = terms.policy.mean(-1)
  d = s - jax.lax.stop_gradient(terms.reference).mean(-1)
  relative = (terms.length * d).reshape(-1, settings.group_size)
  pairs = group_pairs(terms.advantage, terms.keep, settings)
  margin = settings.beta * (relative[:, :, None] - relative[:, None, :])
  total = jnp.maximum(pairs.sum((1, 2)), 1.0)[:, None]  # [B, 1]
  share = pairs.sum(2) / total * settings.group_size  # [B, G]
  loss = -(pairs * jax.nn.log_sigmoid(margin)).sum(2)
  loss = loss / total * settings.group_size
  loss = loss - settings.sft_weight * share * s.reshape(share.shape)
  right = (pairs * (margin > 0)).sum() / jnp.maximum(pairs.sum(), 1.0)
  return loss.reshape(-1), {
    "pair/count": pairs.sum(),
    "pair/accuracy": right,
    **_reference_metrics(terms),
  }


def spg(terms, settings):
  """SPG: a lower bound up, an upper bound down (arXiv 2510.09541).

  s+ = mean_k a_k, a_k the mean of lp over mask k. Upper bound: with t_k the
  share of the completion that mask k hides, e_j = (1 / K) sum_k 1[j in M_k]
  p_kj^b / t_k and U = mean over {j: e_j > 0} of log(e_j) / b. s- = w U +
  (1 - w) s+ ("mix"), U ("eubo"), s+ ("elbo") or 0 ("none").
  L = sum_i n_i (-A_i s_i) / sum_i n_i, s = s+ if A > 0 else s-. Source:
  spg_trainer.py. A = r - group mean.
  """
  lp, inside = terms.policy, (terms.weight > 0)[:, :, 0]  # [N, K, L]
  inside = inside.astype(jnp.float32)
  hidden = jnp.maximum(inside.sum(-1), 1.0)  # [N, K]
  lower = ((inside * lp).sum(-1) / hidden).mean(-1)  # [N]
  length = jnp.maximum(terms.length, 1.0)
  power = settings.bound_power
  log_share = jnp.log(hidden / length[:, None])[:, :, None]
  powers = jnp.where(inside > 0, power * lp - log_share, -jnp.inf)
  any_mask = inside.any(1)  # [N, L]
  # Where no mask hides a token its row would be log 0: kept out of gradients.
  safe = jnp.where(any_mask[:, None], powers, 0.0)
  log_e = jax.nn.logsumexp(safe, axis=1) - jnp.log(lp.shape[1])
  upper = jnp.where(any_mask, log_e, 0.0).sum(-1) / power
  upper = upper / jnp.maximum(any_mask.sum(-1), 1.0)
  omega = settings.bound_mix
  negative = {
    "mix": omega * upper + (1.0 - omega) * lower,
    "eubo": upper,
    "elbo": lower,
    "none": jnp.zeros_like(lower),
  }[settings.negative_score]
  score = jnp.where(terms.advantage > 0, lower, negative)
  loss = -terms.length * terms.advantage * score
  return loss / jnp.maximum(terms.sizes.length, 1.0), {
    "score/policy_mean": mean(lower, terms.keep),
    "score/upper_mean": mean(upper, terms.keep),
  }


def tracerl(terms, settings):
  """TraceRL: token ratios along the sampler's own steps (arXiv 2509.06949).

  L = (1 / rows) sum_v [ -(1 / |P_v|) sum_{P_v} C(rho_j, A) + beta sum_{P_v}
  k3_j ], v the canvases of the trace, P_v what was committed at v, k3 to the
  old policy; `kl_reduction="mean"` averages it over P_v. Source: the dLLM-RL
  program, rl_llada.py. A: z-score with population std.
  """
  own = (terms.weight > 0).astype(jnp.float32)  # [N, 1, C, R]
  size = jnp.maximum(own.sum(-1), 1.0)  # [N, 1, C]
  old = old_values(terms)
  ratio = jnp.exp(terms.policy - old)
  gain = clipped(ratio, terms.advantage[:, None, None], settings)
  per_canvas = -(own * gain[:, :, None]).sum(-1) / size
  kl = (own * k3(old - terms.policy)[:, :, None]).sum(-1)
  if settings.kl_reduction == "mean":
    kl = kl / size
  loss = (per_canvas + settings.kl_weight * kl).sum((1, 2))
  weight = valid_rows(terms) * terms.keep[:, None, None]
  return loss / jnp.maximum(terms.sizes.canvases, 1.0), {
    "score/policy_mean": (weight * terms.policy).sum()
    / jnp.maximum(weight.sum(), 1.0),
    **_ratio_metrics(ratio, weight, settings),
  }


def justgrpo(terms, settings):
  """JustGRPO: GRPO on a left-to-right decomposition (arXiv 2601.15165).

  L = -(1 / L_canvas) sum_t C(rho_t, A), rho_t = exp(lp_t - old_t), row t with
  y_<t visible: the trace of a rollout with blocks of one token. Source:
  grpo.py. A = (r - mean) / (std + 1e-4); groups of equal rewards are dropped.
  """
  valid = valid_rows(terms)
  ratio = jnp.exp(terms.policy - old_values(terms))
  gain = clipped(ratio, terms.advantage[:, None, None], settings)
  weight = valid * terms.keep[:, None, None]
  return -(valid * gain).sum((1, 2)) / valid.shape[-1], {
    "score/policy_mean": (weight * terms.policy).sum()
    / jnp.maximum(weight.sum(), 1.0),
    **_ratio_metrics(ratio, weight, settings),
  }


def trafl(terms, settings):
  """TraFL: trajectory balance on relative ELBOs (arXiv 2605.13935).

  L = (d - (beta / u)(r - mean r) + z(x))^2, u the mean number of masked
  positions. The paper learns z with a head on the prompt; here z is its
  optimum for the group, stopped: what an infinitely fast head would say.
  Known from a second-hand note only. With beta / u = 1 / lambda its gradient
  is 2 / lambda times RSPO's, group-centred.
  """
  d = (terms.policy - jax.lax.stop_gradient(terms.reference)).mean(-1)
  hidden = jnp.maximum(terms.count.mean(-1), 1.0)
  error = d - settings.beta / hidden * terms.advantage
  size = settings.group_size
  kept = terms.keep.reshape(-1, size)
  grouped = error.reshape(-1, size) * kept
  z = grouped.sum(-1) / jnp.maximum(kept.sum(-1), 1.0)
  z = jax.lax.stop_gradient(jnp.repeat(z, size))
  return jnp.square(error - z), _reference_metrics(terms)

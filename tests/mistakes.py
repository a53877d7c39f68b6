"""Mistakes that students make in the exercises, and answers that are right in another way.

MISTAKES: name of the function -> (the mistake in words, what stands there, what stands there then).
RIGHT_TOO: name of the function -> imports, and a body that does what the hints say.
"""

MISTAKES = {
    "gpt2_config": [
        ("parallel blocks", "parallel_residual=False", "parallel_residual=True"),
        ("two rows before position 0", 'j.get("n_positions", int, 1024)', "1026"),
        ("positions begin at 2", "1024),\n", "1024),\n        position_offset=2,\n"),
        ("exact gelu", 'j.activation("gelu_new", "activation_function")', '"gelu"'),
        ("n_inner unread", 'mlp_key="n_inner"', 'mlp_key="inner"'),
        ("n_inner is n_embd", "4 * j.get", "j.get"),
        ("epsilon unread", 'j.get("layer_norm_epsilon", float, 1e-5)', "1e-5"),
        ("rms norm", 'norm="layer"', 'norm="rms"'),
        ("gated", "gated=False", "gated=True"),
        ("rotation", "rotary_width=0", 'rotary_width=sizes["head_width"]'),
        ("no biases", "qkv_bias=True", "qkv_bias=False"),
        ("width and heads exchanged", '("n_embd", "n_head"', '("n_head", "n_embd"'),
        ("nothing refused", "is value,", "is not None,"),
    ],
    "pair_losses": [
        ("sign", "losses = -F.logsigmoid(margins)", "losses = F.logsigmoid(margins)"),
        ("margin the wrong way", "-F.logsigmoid(margins)", "-F.logsigmoid(-margins)"),
        ("mean of all pairs", "return losses\n", "return losses.mean()\n"),
        ("overflow", "-F.logsigmoid(margins)", "-(1 / (1 + (-margins).exp())).log()"),
        ("bits", "-F.logsigmoid(margins)", "-F.logsigmoid(margins) / 0.6931471805599453"),
        ("smoothing forgotten", "if smoothing == 0:", "if True:"),
        ("smoothing twice", "(1 - smoothing) * losses", "(1 - 2 * smoothing) * losses"),
        ("detached", "losses = -F.logsigmoid(margins)", "losses = -F.logsigmoid(margins.detach())"),
    ],
    "pair_ece": [
        ("all bins alike", "np.sum(r.count * _gaps(r)) / r.count.sum()", "np.mean(_gaps(r))"),
        ("largest gap", "np.sum(r.count * _gaps(r)) / r.count.sum()", "np.max(_gaps(r))"),
        ("squares", "r.count * _gaps(r)", "r.count * _gaps(r) ** 2"),
        ("sum for mean", " / r.count.sum()", ""),
        ("half of the predictions", " / r.count.sum()", " / len(margins)"),
        ("outcomes forgotten", "bins, outcomes)", "bins)"),
        ("bins forgotten", "bins, outcomes)", "10, outcomes)"),
        ("NaN of empty bins", "_gaps(r)", "np.abs(r.accuracy - r.confidence)"),
        ("gaps may cancel", "_gaps(r)", "np.nan_to_num(r.accuracy - r.confidence)"),
    ],
    "head_gradients": [
        ("sign", "smoothing - torch.sigmoid(-margins)", "torch.sigmoid(-margins) - smoothing"),
        ("sum for mean", ".mean(0)", ".sum(0)"),
        ("mean over all pairs", ".mean(0)", ".sum(0) / len(source)"),
        ("σ(m) for σ(-m)", "torch.sigmoid(-margins)", "torch.sigmoid(margins)"),
        ("smoothing forgotten", "smoothing - torch", "-torch"),
        ("not detached", "@ head.detach()", "@ head"),
        ("margin the wrong way", "(z_chosen - z_rejected).detach()", "(z_rejected - z_chosen)"),
        ("absent source is 0", ".mean(0) for", ".mean(0).nan_to_num() for"),
        ("K of the batch alone", "_count(source, sources)", "int(source.max()) + 1"),
    ],
    "normalize_gradients": [
        ("0 / 0", "norm(dim=1, keepdim=True).clamp_min(tiny)", "norm(dim=1, keepdim=True)"),
        ("norm of columns", "scaled.norm(dim=1", "scaled.norm(dim=0"),
        ("all rows by one norm", "scaled.norm(dim=1, keepdim=True)", "scaled.norm()"),
        ("squares vanish", " / G.abs().amax(1, keepdim=True).clamp_min(tiny)", ""),
        ("loss without its 1", "(losses + 1).sum()", "losses.sum()"),
        ("loss times", "return G / ((losses + 1)", "return G * ((losses + 1)"),
        ("loss+ divides by nothing", " / losses.clamp_min(1e-100)[:, None]", ""),
        ("fp32", "gradients.double(), losses.double()", "gradients, losses"),
        ("unknown name", 'raise ValueError(f"normalize', 'return (f"normalize'),
    ],
    "group_dro_weights": [
        ("sign", "rate * losses", "-rate * losses"),
        ("state forgotten", 'state["log_q"] = log_q =', "log_q ="),
        ("q is not a product", "log_q = log_q + torch", "log_q = torch"),
        ("absent source gets a weight", "torch.where(present, log_q, -torch.inf)", "log_q"),
        ("absent source grows", "torch.where(present, rate * losses, 0)", "rate * losses"),
        ("absent source lost", 'state["log_q"] = log_q = log_q',
         'state["log_q"] = log_q = torch.where(present, log_q, -torch.inf)'),
        ("not normalised", ".softmax(0)", ".exp()"),
        ("overflow", "return torch.where(present, log_q, -torch.inf).softmax(0)",
         "q = present * (log_q + 1000).exp()\n    return q / q.sum()"),
        ("graph", "losses.detach()", "losses"),
        ("rate forgotten", "rate * losses", "losses"),
    ],
    "reliability": [
        ("left-closed bins", 'side="left"', 'side="right"'),
        ("one bin too few", "edges[1:-1]", "edges[1:-2]"),
        ("off by one", "edges[1:-1]", "edges[:-1]"),
        ("unsorted", 'np.argsort(p, kind="stable")', "np.arange(len(p))"),
        ("empty bins are 0", "return Reliability(count, confidence, accuracy, edges)",
         "return Reliability(count, np.nan_to_num(confidence), np.nan_to_num(accuracy), edges)"),
        ("sums for means", "weights=y, minlength=bins) / count", "weights=y, minlength=bins)"),
        ("swapped", "return Reliability(count, confidence, accuracy, edges)",
         "return Reliability(count, accuracy, confidence, edges)"),
        ("empty bins at the end lost", "np.bincount(index, minlength=bins)", "np.bincount(index)"),
        ("no check of ranges", "p.min() < 0 or p.max() > 1", "False"),
    ],
    "adamw_": [
        ("1 - β₁ forgotten", "m.lerp_(g, 1 - betas[0])", "m.mul_(betas[0]).add_(g)"),
        ("1 - β₂ forgotten", "addcmul_(g * (1 - betas[1]), g)", "addcmul_(g, g)"),
        ("betas swapped", "m.lerp_(g, 1 - betas[0])", "m.lerp_(g, 1 - betas[1])"),
        ("square forgotten", "addcmul_(g * (1 - betas[1]), g)", "add_(g.abs() * (1 - betas[1]))"),
        ("no correction of v", ".div_(coefficients.root)", ""),
        ("correction of v upside down", ".div_(coefficients.root)", ".mul_(coefficients.root)"),
        ("eps too early", "v.sqrt().div_(coefficients.root).add_(eps)",
         "v.sqrt().add_(eps).div_(coefficients.root)"),
        ("eps under the root", "v.sqrt().div_(coefficients.root).add_(eps)",
         "(v / coefficients.root**2 + eps).sqrt()"),
        ("uphill", "-coefficients.rate", "coefficients.rate"),
        ("no decay", "value.mul_(coefficients.keep)", "pass"),
        ("decay in the gradient", "value.mul_(coefficients.keep)",
         "g = g + (1 - coefficients.keep) * value"),
        ("not in place", "value.mul_(coefficients.keep)", "value = value * coefficients.keep"),
    ],
    "fit_temperature": [
        ("1 / T", "float(scale / middle)", "float(middle / scale)"),
        ("scale lost", "float(scale / middle)", "float(1 / middle)"),
        ("no infinity", 'return float("inf")', "return 1.0"),
        ("separable", "return 0.0", "return 1.0"),
        ("outcomes forgotten", "outcomes_of(outcomes, len(m))", "np.ones(len(m))"),
        ("one step", "while low < middle < high:", "if low < middle < high:"),
        ("wrong half", "        if slope(middle) > 0:", "        if slope(middle) < 0:"),
        ("coarse", "while low < middle < high:", "while high - low > 1e-3:"),
    ],
    "weights_of_ranks": [
        ("drawn with replacement", "    weights = np.zeros(N)",
         "    return np.diff((np.arange(N + 1) / N) ** n)\n    weights = np.zeros(N)"),
        ("off by one", "(i - n) / (i - 1)", "(i - n) / i"),
        ("one place too low", "weights[i - 2] = weights[i - 1]", "weights[i - 3] = weights[i - 1]"),
        ("upside down", "return weights\n", "return weights[::-1]\n"),
        ("not divided", "weights[N - 1] = n / N", "weights[N - 1] = 1"),
        ("the best alone", "for i in range(N, n, -1):", "for i in ():"),
        ("not refused", "if not 1 <= n <= N:", "if n > N:"),
        ("uniform", "return weights\n", "return np.full(N, 1 / N)\n"),
    ],
    "visible_keys": [
        ("not itself", "distance >= 0", "distance > 0"),
        ("the future", "distance >= 0", "distance <= 0"),
        ("padding", " & ~key_is_padding[:, None, :]", ""),
        ("only padding", "~key_is_padding", "key_is_padding"),
        ("window one too wide", "distance < window", "distance <= window"),
        ("no window", "distance < window", "True"),
        ("places for positions", "queries[:, :, None] - keys[:, None, :]",
         "np.arange(queries.shape[1])[:, None] - np.arange(keys.shape[1]) + 0 * keys[:, None]"),
        ("sees nothing", "visible[..., -1] |= ~visible.any(-1)", "pass"),
        ("axes swapped", "return visible", "return visible.swapaxes(1, 2)"),
    ],
    "pack": [
        ("positions go on", "positions.extend(range(shared, shared + len(continuation)))",
         "positions.extend(range(first - start, first - start + len(continuation)))"),
        ("positions of its own", "range(shared, shared + len(continuation))",
         "range(len(continuation))"),
        ("last off by one", "last.append(len(tokens) - 1)", "last.append(len(tokens))"),
        ("first token for last", "last.append(len(tokens) - 1)", "last.append(first)"),
        ("prefix has no queries", "Segment(start, len(tokens), start, start)",
         "Segment(first, len(tokens), start, prefix_end)"),
        ("sees the sibling", "Segment(first, len(tokens), start, prefix_end)",
         "Segment(first, len(tokens), start, first)"),
        ("no prefix", "Segment(first, len(tokens), start, prefix_end)",
         "Segment(first, len(tokens), first, first)"),
        ("prefix of the first item", "Segment(first, len(tokens), start, prefix_end)",
         "Segment(first, len(tokens), 0, shared)"),
        ("empty text", "not all(len(continuation) for continuation in continuations)", "False"),
        ("int32", "torch.tensor(last, dtype=torch.int64)", "torch.tensor(last, dtype=torch.int32)"),
    ],
    "round_at_random": [
        ("cut", "(bits & 0xFFFF)", "0 * bits"),
        ("nearest", "(bits & 0xFFFF)", "0x8000 + 0 * bits"),
        ("torch's cast", "return (raised & -0x10000)", "return x + 0 * (raised & -0x10000)"),
        ("all 32 bits", "(bits & 0xFFFF)", "bits"),
        ("8 bits", "(bits & 0xFFFF)", "(bits & 0xFF)"),
        ("off by one", "(bits & 0xFFFF)", "(bits & 0xFFFF) + 1"),
        ("the cast rounds again", "(raised & -0x10000)", "raised"),
        ("fp32", ".bfloat16()", ""),
    ],
    "split": [
        ("cut", "bits + 0x8000", "bits"),
        ("torch's cast", "(high << 16).view(torch.float32).bfloat16()", "x.bfloat16()"),
        ("one place too low", "0x8000", "0x4000"),
        ("ties to zero", "0x8000", "0x7FFF"),
        ("half of the rest", "(bits - (high << 16))", "(bits & 0x7FFF)"),
        ("sign of the rest", "(bits - (high << 16))", "((high << 16) - bits)"),
        ("int32", ".to(torch.int16)", ""),
        ("no rest", "(bits - (high << 16))", "(0 * bits)"),
    ],
    "noise_floor": [
        ("outcomes as they are", "_drawn(p, votes, random) - p", "1 - p"),
        ("fair coin", "_drawn(p, votes, random) - p", "_drawn(0 * p + 0.5, votes, random) - p"),
        ("gaps cancel", "np.abs(gaps).sum()", "abs(gaps.sum())"),
        ("one order", "+ np.bincount(bin_of_rest, -gap, bins)", ""),
        ("N for 2 N", "/ (2 * N))", "/ N)"),
        ("votes forgotten", "_drawn(p, votes, random)", "_drawn(p, None, random)"),
        ("every pair its own bin", "np.abs(gaps).sum()", "2 * np.abs(gap).sum()"),
        ("90% quantile", "np.quantile(eces, 0.95)", "np.quantile(eces, 0.9)"),
        ("mean alone", "float(np.quantile(eces, 0.95))", "float(np.mean(eces))"),
        ("seed forgotten", "default_rng(seed)", "default_rng(0)"),
        ("all in one bin", "np.abs(gaps).sum()", "2 * abs(gap.sum())"),
    ],
    "min_norm_weights": [
        ("uniform", "    G = _checked(gradients)\n",
         "    K = len(gradients)\n    return torch.full((K,), 1 / K, dtype=torch.float64)\n"),
        ("inverse lengths", "    units =",
         "    return (1 / norms) / (1 / norms).sum()\n    units ="),
        ("the shortest gradient", "    units =",
         "    return (norms == norms.min()).double() / (norms == norms.min()).sum()\n    units ="),
        ("weights below 0", "    units =", "    x = torch.linalg.lstsq(G @ G.T, torch.ones(len(G), "
         "dtype=G.dtype)).solution\n    return x / x.sum()\n    units ="),
        ("clipped", "    units =", "    x = torch.linalg.lstsq(G @ G.T, torch.ones(len(G), "
         "dtype=G.dtype)).solution.clamp_min(0)\n    return x / x.sum()\n    units ="),
        ("the longest vector", "lengths.argmin()", "lengths.nan_to_num(0, 0, 0).argmax()"),
        ("lengths forgotten", "C, b = units @ units.T, norms.min() / norms",
         "C, b = units @ units.T, torch.ones_like(norms)"),
        ("zero row", "return (norms == 0).double() / (norms == 0).sum()",
         "return (norms != 0).double() / (norms != 0).sum()"),
        ("not normalised", "candidates = candidates / candidates.sum(1, keepdim=True)", ""),
        ("NaN", "_checked(gradients)", "_checked(gradients.nan_to_num())"),
    ],
    "recomputed_gradients": [
        ("norm behind forgotten", "if block.norm_after:", "if False:"),
        ("mean for sum", "d_y.sum(0)", "d_y.mean(0)"),
        ("transposed", "d_y.T @ hidden", "hidden.T @ d_y"),
        ("bias forgotten", "if last.bias is not None:", "if False:"),
        ("residual forgotten", "[d_y, d_hidden])", "[0 * d_y, d_hidden])"),
        ("hidden layer forgotten", "[d_y, d_hidden])", "[d_y, 0 * d_hidden])"),
        ("residual twice", "return d_x, gradients", "return d_x + d_y, gradients"),
        ("no leaf", "x = x.detach().requires_grad_()", "x = x.detach()"),
        ("d_y for d_x", "return d_x, gradients", "return d_y, gradients"),
        ("others forgotten", "gradients | dict(zip(others, d_others))", "gradients"),
    ],
}  # fmt: skip

RIGHT_TOO = {
    "pair_losses": ("", """
    s = smoothing
    return -(1 - s) * F.logsigmoid(margins) - s * F.logsigmoid(-margins)
"""),
    "pair_ece": ("", """
    p = np.array([1 / (1 + np.exp(-s * m)) for m in margins for s in (1, -1)])
    y = np.array([v for o in np.broadcast_to(outcomes, len(margins)) for v in (o, 1 - o)])
    total = 0.0
    for low in np.arange(bins) / bins:
        is_here = (p > low) & (p <= low + 1 / bins)
        total += abs((y - p)[is_here].sum())
    return total / len(p)
"""),
    "head_gradients": ("from minimore.more import bradley_terry_losses", """
    head = head.detach().requires_grad_()
    losses = bradley_terry_losses(head, z_chosen, z_rejected, source, sources, smoothing)
    rows = [torch.autograd.grad(loss, head, retain_graph=True)[0] for loss in losses]
    return torch.stack([r if n else r * torch.nan for r, n in zip(rows, losses.isfinite())])
"""),
    "group_dro_weights": ("", """
    present = pairs > 0
    log_q = state.get("mine", torch.zeros(len(losses), dtype=losses.dtype))
    log_q[present] += rate * losses.detach()[present]
    state["mine"] = log_q = log_q - log_q.max()
    weights = log_q.exp() * present
    return weights / weights.sum()
"""),
    "adamw_": ("", """
    b1, b2 = betas
    m.mul_(b1).add_(g, alpha=1 - b1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    step = coefficients.rate * m / (v.sqrt() / coefficients.root + eps)
    value.mul_(coefficients.keep).sub_(step)
"""),
    "fit_temperature": ("", """
    m = np.asarray(margins, float)
    y = np.broadcast_to(np.asarray(outcomes, float), len(m))
    m, y = np.concatenate([m, -m]), np.concatenate([y, 1 - y])  # a vote for either side
    m, y = m[y > 0], y[y > 0]
    if (y * m).sum() <= 0:
        return np.inf
    if m.min() >= 0:
        return 0.0
    low, high = 0.0, 1e3 / np.abs(m).max()
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if (y * m / (1 + np.exp(t * m))).sum() > 0 else (low, t)
    return 1 / t
"""),
    "weights_of_ranks": ("from math import comb", """
    if not 1 <= n <= N:
        raise ValueError("n")
    return np.array([comb(i, n - 1) / comb(N, n) for i in range(N)])
"""),
    "visible_keys": ("", """
    T, Q, L = *queries.shape, keys.shape[1]
    visible = np.zeros((T, Q, L), bool)
    for t, q, key in np.ndindex(T, Q, L):
        behind = queries[t, q] - keys[t, key]
        is_near = window is None or behind < window
        visible[t, q, key] = behind >= 0 and is_near and not key_is_padding[t, key]
    if window is not None:
        visible[~visible.any(-1), -1] = True
    return visible
"""),
    "round_at_random": ("", """
    whole = x.view(torch.int32).long()
    low = whole & 0xFFFF
    up = (bits & 0xFFFF) >= 65536 - low
    return ((whole - low + 65536 * up).int()).view(torch.float32).bfloat16()
"""),
    "noise_floor": ("from minimore.calibration import pair_ece", """
    random = np.random.default_rng(seed)
    m = np.abs(np.asarray(margins))
    n = 1 if votes is None else votes
    shares = random.binomial(n, 1 / (1 + np.exp(-m)), size=(replicates, len(m))) / n
    eces = [pair_ece(m, bins, share) for share in shares]
    return Floor(np.mean(eces), np.quantile(eces, 0.95))
"""),
    "min_norm_weights": ("from itertools import combinations", """
    G = _checked(gradients)
    best = None
    for size in range(1, len(G) + 1):
        for S in combinations(range(len(G)), size):
            own = G[list(S)] / G.norm(dim=1).max()
            M, ones = own @ own.T, torch.ones(size, dtype=G.dtype)
            inside = torch.linalg.solve(M + 1e-13 * torch.eye(size), ones)
            weights = torch.zeros(len(G), dtype=G.dtype)
            weights[list(S)] = inside / inside.sum()
            length = (weights @ G).norm()
            if weights.min() >= 0 and (best is None or length < best[0]):
                best = length, weights
    return best[1]
"""),
    "recomputed_gradients": ("", """
    leaf = x.detach().requires_grad_()
    names = dict(block.named_parameters())
    with torch.enable_grad():
        y = block(leaf, rotation, stream)
    d_x, *others = torch.autograd.grad(y, [leaf, *names.values()], d_y)
    return d_x, dict(zip(names, others))
"""),
}  # fmt: skip

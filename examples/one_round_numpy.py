"""One round of Pilot (Xiong et al., AAAI 2025, arXiv 2501.13985) in plain NumPy, to be read from top to bottom.

K clients adapt one frozen vision–language model together. Each has images and answers for one of T tasks, which never
leave it. Only small adapters are trained, and of these only the task adapter ψ_t and the LoRA are sent to a server. A
round has two stages. In each, all clients train on their own data, and then the server combines what they have sent.

The model is tiny here: the vision tower has already turned each image into features H [N, D], the language model is one
layer and a head, and an answer is one word. All else is the whole method with the defaults of pilot_jax, which
tests/parity/test_one_round.py compares with this file. A gradient is computed by moving each parameter up and down a
little: that is slow and obviously right. `python examples/one_round_numpy.py` takes a few seconds.
"""

import math

import numpy as np

K, T, B = 6, 3, 4  # clients; tasks, each of which has an expert in the mixture (E = T); samples in a batch
N, D, C, R, V = 4, 2, 3, 2, 5  # tokens of an image; vision width; model width; LoRA's rank; words that can be an answer
LOSS_WEIGHTS = {"ce": 1.0, "difference": 0.1, "balance": 0.1, "z": 0.01}  # L_d keeps ψ_t and ψ_s apart
NEIGHBORS, AUTO_FACTOR = 2, 0.25  # ATA: other clients in a mixture; temperature, as a share of the distance to them
CROSS = [("cross", i) for i in range(T)]  # names of the adapters ψ_c, one for each task; "task" is ψ_t, "client" is ψ_s
TRAINED = {1: ("task", "client", "lora"), 2: ("task", *CROSS, "router", "lora")}  # by stage; the rest is frozen
RATE, LORA_RATE = 0.1, {1: 0.2, 2: 0.15}  # peak learning rates: of everything but LoRA; of LoRA, by stage
WARMUP, ADAM_EPSILON, LORA_SCALE = 0.5, 1e-8, 2.0  # share of a client's steps in which the rate rises; ε; α/r
rng, erf = np.random.default_rng(1), np.vectorize(math.erf)
BASE = {"layer": rng.normal(size=(C, C)), "head": rng.normal(size=(V, C))}  # the language model, which stays frozen


def make_federation():
    """Returns K clients and the adapters with which all begin. A task is a rule from images to answers."""
    rules, clients = rng.normal(size=(T, D, V)), []
    for k, n in enumerate((6, 10, 8, 12, 7, 11)):
        H = rng.normal(size=(n, N, D)) + rng.normal(size=D)  # each client has images of a kind
        clients.append({"task": k % T, "n": n, "H": H, "y": np.argmax(H.mean(axis=1) @ rules[k % T], axis=1)})
    psi = {"w1": rng.normal(size=(D, C)), "b1": np.zeros(C), "w2": rng.normal(size=(C, C)), "b2": np.zeros(C)}
    silent = psi | {"w2": np.zeros((C, C))}  # ψ_s and ψ_c: with a zero last layer they add nothing yet, nor does LoRA
    return clients, {"task": psi, "client": silent, **dict.fromkeys(CROSS, silent), "router": {
        "w": rng.normal(size=(D, T)) / 50}, "lora": {"a": rng.uniform(-0.5, 0.5, size=(R, C)), "b": np.zeros((C, R))}}


def mlp(psi, H):
    """Returns ψ(H) [B, N, C] of features H [B, N, D]. Every adapter ψ is a linear layer, a GELU and a linear layer."""
    x = H @ psi["w1"] + psi["b1"]
    return x * (1 + erf(x / math.sqrt(2))) / 2 @ psi["w2"] + psi["b2"]


def softmax(logits):
    """Returns probabilities, which sum to 1 along the last axis."""
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def mixture(p, H, own):
    """Returns x [B, N, C] of stage 2 (§3.3), by the adapters p of a client of task `own`, and router logits [B, N, E].

    Every token has its own weights P for the experts. The expert of another task is the adapter that the server has
    sent for it, which is frozen as ψ_s is, plus a correction ψ_c, which is learnt."""
    logits = H @ p["router"]["w"]
    P, x = softmax(logits), mlp(p["client"], H)
    for i in range(T):
        h = mlp(p["task"], H) if i == own else mlp(p["bank", i], H) + mlp(p["cross", i], H)
        x = x + P[:, :, i, None] * h
    return x, logits


def losses(p, H, y, own, stage, eps, share):
    """Returns the terms of a batch's loss, and the loss. The numbers eps and share count as constants in gradients."""
    if stage == 1:
        x_t, x_s = mlp(p["task"], H), mlp(p["client"], H)
        t, s = (a / np.sqrt((a**2).sum(axis=2, keepdims=True) + eps**2) for a in (x_t, x_s))  # tokens of length ≈ 1
        x, terms = x_t + x_s, {"difference": ((t.swapaxes(1, 2) @ s) ** 2).sum(axis=(1, 2)).mean() / N**2}  # L_d, §3.2
    else:
        x, logits = mixture(p, H, own)
        terms = {"balance": T * (share * softmax(logits).mean(axis=1)).sum(axis=1).mean(),  # L_b: all experts in use
                 "z": (np.log(np.exp(logits).sum(axis=2)) ** 2).mean()}  # L_z: the logits stay small
    layer = BASE["layer"] + LORA_SCALE * p["lora"]["b"] @ p["lora"]["a"]
    words = softmax(np.tanh(x @ layer.T).mean(axis=1) @ BASE["head"].T)  # the language model's probabilities [B, V]
    terms["ce"] = -np.log(words[np.arange(len(y)), y]).mean()
    return terms | {"loss": sum(LOSS_WEIGHTS[name] * value for name, value in terms.items())}


def gradient(p, w, *batch, h=1e-5):
    """Returns the gradient of the loss by w, which is one of the arrays in p: (L(w + h) − L(w − h)) / 2h, by entry."""
    out = np.zeros_like(w)
    for i, middle in np.ndenumerate(w.copy()):
        for sign in (1, -1):
            w[i] = middle + sign * h
            out[i] += sign * losses(p, *batch)["loss"] / (2 * h)
        w[i] = middle
    return out


def train(p, client, stage, batches):
    """Returns the adapters after one step of AdamW (without weight decay) on each batch, and the batches' losses."""
    p, history, S = {name: {x: w.copy() for x, w in psi.items()} for name, psi in p.items()}, [], len(batches)
    arrays = [(w, np.zeros_like(w), np.zeros_like(w), LORA_RATE[stage] if name == "lora" else RATE)
              for name in TRAINED[stage] for w in p[name].values()]
    for i, rows in enumerate(batches):
        H, y = client["H"][rows], client["y"][rows]
        eps = 0.1 * np.linalg.norm(mlp(p["task"], H), axis=2).mean(axis=1)[:, None, None]
        share = np.eye(T)[(H @ p["router"]["w"]).argmax(axis=2)].mean(axis=1)  # of tokens that prefer an expert [B, E]
        history.append(losses(p, H, y, client["task"], stage, eps, share))
        gradients = [gradient(p, w, H, y, client["task"], stage, eps, share) for w, *_ in arrays]
        schedule = min(1, (i + 1) / math.ceil(WARMUP * S)) * (1 + math.cos(math.pi * i / S)) / 2
        for (w, m, v, peak), g in zip(arrays, gradients, strict=True):  # m, v: means of g and of g²
            m += 0.1 * (g - m)
            v += 0.001 * (g**2 - v)
            w -= schedule * peak * (m / (1 - 0.9 ** (i + 1))) / (np.sqrt(v / (1 - 0.999 ** (i + 1))) + ADAM_EPSILON)
    return p, history


def mix(adapters, weights):
    """Returns the weighted sum of several clients' adapters, array by array."""
    return {name: sum(w * a[name] for w, a in zip(weights, adapters, strict=True)) for name in adapters[0]}


def aggregate(uploads, clients):
    """Returns ATA's weights [K, K], and what each client receives: the mean ψ_t of each task, and a LoRA of its own."""
    bank, weights = {}, np.zeros((K, K))
    for t in range(T):
        n = np.array([c["n"] if c["task"] == t else 0 for c in clients])
        bank["bank", t] = mix([u["task"] for u in uploads], n / n.sum())
    flat = np.stack([np.concatenate([u["lora"]["a"].ravel(), u["lora"]["b"].ravel()]) for u in uploads])
    for k, d in enumerate(np.linalg.norm(flat[:, None] - flat, axis=2)):  # §3.4, ATA
        near = [j for j in np.argsort(d) if j != k][:NEIGHBORS]
        weights[k, [k, *near]] = softmax(-d[[k, *near]] / (AUTO_FACTOR * d[near].mean()))
    return weights, [bank | {"task": bank["bank", c["task"]], "lora": mix([u["lora"] for u in uploads], row)}
                     for c, row in zip(clients, weights, strict=True)]


def one_round(clients, start, batches):
    """Yields what has happened, after each stage. batches(k, stage) has the sample numbers of client k's every step."""
    adapters = [start] * K
    for stage in (1, 2):
        done = [train(adapters[k], clients[k], stage, batches(k, stage)) for k in range(K)]
        uploads = [{"task": p["task"], "lora": p["lora"]} for p, _ in done]  # nothing else leaves a client
        weights, downloads = aggregate(uploads, clients)
        adapters = [p | received for (p, _), received in zip(done, downloads, strict=True)]
        yield {"uploads": uploads, "weights": weights, "adapters": adapters, "losses": [h for _, h in done]}


if __name__ == "__main__":
    federation, first = make_federation()
    orders = {(k, stage): rng.permutation(c["n"]) for stage in (1, 2) for k, c in enumerate(federation)}
    stages = list(one_round(federation, first, lambda *at: np.split(orders[at], range(B, len(orders[at]), B))))
    print("client  task  samples  L_ce at first  after stage 1  after stage 2")
    for k, c in enumerate(federation):
        points = (first, 1), (stages[0]["adapters"][k], 1), (stages[1]["adapters"][k], 2)
        ce = [losses(p, c["H"], c["y"], c["task"], stage, 1, 1)["ce"] for p, stage in points]
        print(f"{k:6}{c['task']:6}{c['n']:9}{ce[0]:15.3f}{ce[1]:15.3f}{ce[2]:15.3f}")
    print("\nATA's weights after stage 2, a row for each client:", stages[1]["weights"].round(2), sep="\n")

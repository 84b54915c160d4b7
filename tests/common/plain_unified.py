# SPDX-License-Identifier: BSD-3-Clause
"""The unified loss once more, row by row and token by token: what the modules are compared with.

Nothing of masked_loss_ext is used. Loops over positions, lists of Python for n-grams and runs.
"""

import math

import torch


def log_softmax(row, temperature=1.0):
    z = row / temperature
    return z - torch.logsumexp(z, -1)


def mean(terms, like):
    return torch.stack(terms).mean() if terms else like.sum() * 0


def never(log_p):
    """-log(1 - p)"""
    return -torch.log1p(-log_p.exp())


class Plain:
    """Of one batch: logits [B, S, V] without NaN, targets and valid [B, S]."""

    def __init__(self, logits, targets, valid, pad=None):
        self.logits, self.targets, self.valid = logits, targets.tolist(), valid.tolist()
        self.classes = logits.shape[-1]
        batch, length = targets.shape
        self.places = [(b, s) for b in range(batch) for s in range(length) if self.valid[b][s]]
        self.said = [
            [self.valid[b][s] and self.targets[b][s] != pad for s in range(length)]
            for b in range(batch)
        ]

    def cross_entropy(self, smoothing=0.0, temperature=1.0):
        share = smoothing / (self.classes - 1)
        terms = []
        for b, s in self.places:
            log_p = log_softmax(self.logits[b, s], temperature)
            q = torch.full_like(log_p, share)
            q[self.targets[b][s]] = 1 - smoothing
            terms.append(-(q * log_p).sum())
        return mean(terms, self.logits)

    def focal(self, alpha, gamma):
        terms = []
        for b, s in self.places:
            log_p = log_softmax(self.logits[b, s])[self.targets[b][s]]
            terms.append(-alpha * (1 - log_p.exp()) ** gamma * log_p)
        return mean(terms, self.logits)

    def diversity(self):
        """1 - H / ln V"""
        terms = []
        for b, s in self.places:
            log_p = log_softmax(self.logits[b, s])
            terms.append(1 + (log_p.exp() * log_p).sum() / math.log(self.classes))
        return mean(terms, self.logits)

    def windows(self, n):
        """Per row: (end, n-gram) of each window of which all positions count."""
        for row, said in zip(self.targets, self.said, strict=True):
            ends = [t for t in range(n - 1, len(row)) if all(said[t - n + 1 : t + 1])]
            yield row, [(t, tuple(row[t - n + 1 : t + 1])) for t in ends]

    def ngram_pairs(self, n):
        pairs = windows = 0
        for _, found in self.windows(n):
            windows += len(found)
            pairs += sum(g == h for i, (_, g) in enumerate(found) for _, h in found[:i])
        return pairs / max(windows, 1)

    def ngram_unlikelihood(self, n):
        terms = []
        for b, (row, found) in enumerate(self.windows(n)):
            for i, (t, gram) in enumerate(found):
                seen = {h[-1] for _, h in found[:i] if h[:-1] == gram[:-1]} - {row[t]}
                log_p = log_softmax(self.logits[b, t])
                terms += [never(log_p[c]) for c in sorted(seen)]
        return mean(terms, self.logits)

    def runs(self):
        squares = []
        for row, said in zip(self.targets, self.said, strict=True):
            longest = run = 0
            for t in range(len(row)):
                same = run > 0 and said[t] and row[t] == row[t - 1]
                run = run + 1 if same else int(said[t])
                longest = max(longest, run)
            if longest:
                squares.append((longest - 1) ** 2)
        return sum(squares) / max(len(squares), 1)

    def run_unlikelihood(self):
        terms = []
        for b, (row, said) in enumerate(zip(self.targets, self.said, strict=True)):
            for t in range(1, len(row)):
                if said[t] and said[t - 1] and row[t] != row[t - 1]:
                    terms.append(never(log_softmax(self.logits[b, t])[row[t - 1]]))
        return mean(terms, self.logits)

    def early_ends(self, eos, least):
        early = [s < least and self.targets[b][s] == eos for b, s in self.places]
        return sum(early) / max(len(early), 1)

    def early_unlikelihood(self, eos, least):
        return mean(
            [
                never(log_softmax(self.logits[b, s])[eos])
                for b, s in self.places
                if s < least and self.targets[b][s] != eos
            ],
            self.logits,
        )

    def head(self, logits, distance, smoothing=0.0, temperature=1.0):
        """Cross entropy of logits [B, S, V] against the targets ``distance`` positions on."""
        moved = Plain.__new__(Plain)
        moved.logits, moved.classes = logits, self.classes
        moved.targets = [row[distance:] for row in self.targets]
        moved.places = [(b, s - distance) for b, s in self.places if s >= distance]
        return moved.cross_entropy(smoothing, temperature)


def similarity(outputs, rows):
    cosines = [
        torch.nn.functional.cosine_similarity(x[rows], y[rows], dim=-1).mean()
        for i, x in enumerate(outputs)
        for y in outputs[:i]
    ]
    return sum(cosines) / len(cosines)


def load_balance(gate, indices, rows):
    p, indices = gate[rows].softmax(-1), indices[rows]
    used = torch.stack([(indices == e).sum() for e in range(gate.shape[-1])])
    return gate.shape[-1] * (p.sum(0) * used).sum() / indices.numel() ** 2


def balancing_term(gate, indices, rows, weight=0.1, momentum=0.9):
    """Of the first call: all running counts were 0."""
    tokens, experts = len(rows), gate.shape[-1]
    chosen = indices[rows]
    counts = torch.tensor([(chosen == e).sum() for e in range(experts)]) * (1 - momentum)
    total = tokens * (1 - momentum)
    adjustment = -weight * (counts - chosen.shape[-1] * total / experts) / total
    kept = gate[rows]
    return weight * ((kept - (kept + adjustment).detach()) ** 2).mean()

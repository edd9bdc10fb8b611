"""Prints, for several ε, a lower bound on the privacy loss that an attack on noised uploads proves.

    python benchmarks/privacy_audit.py [--epsilon 1 4 8] [--uploads 4] [--clip 4] [--trials 20000]

A client has one of two data sets, which move its uploads in opposite directions by more than the clipping norm: the
worst case that `federation.privacy` promises to hide. The attacker sees all uploads, knows both directions, and guesses
which data set it was. The bound holds with 95 % confidence and must be below ε. Noise comes from the operating system.
"""

from __future__ import annotations

import argparse

from pilot_jax.config import PrivacyConfig
from pilot_jax.federation.privacy import SystemNoise, multiplier, noised
from pilot_jax.testing.audit import worst_case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 4.0, 8.0])
    parser.add_argument("--uploads", type=int, default=4)
    parser.add_argument("--clip", type=float, default=4.0)
    parser.add_argument("--trials", type=int, default=20_000, help="of each data set")
    args = parser.parse_args()

    def halved(upload, start, clip, deviation, rng):
        return noised(upload, start, clip, deviation / 2, rng)

    print("| promised ε | noise multiplier z | proved ε ≥ | with half the noise, proved ε ≥ |\n|---:|---:|---:|---:|")
    for epsilon in args.epsilon:
        privacy = PrivacyConfig(clip=args.clip, epsilon=epsilon)
        found = [worst_case(privacy, args.uploads, args.trials, SystemNoise(), how) for how in (noised, halved)]
        z = multiplier(privacy, args.uploads)
        print(f"| {epsilon:g} | {z:.2f} | {found[0]:.2f} | {found[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()

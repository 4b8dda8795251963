"""What the paper claims, and what this run says about it: sentences that follow from the numbers, either way."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from reproduce import verdicts
from reproduce.tables import cost, extra, pictures, policies, study, values
from reproduce.tables.book import Book
from reproduce.tables.rows import Row

HOLDS, PART, NOT, UNTOLD, UNTESTED = (
    "holds", "holds in part", "does not hold", "cannot be told", "not tested here"
)  # fmt: skip

STATES = (HOLDS, PART, NOT, UNTOLD)

CLAIMS = {
    "improves dvpo-q": ("DVPO with A = Q improves on the policy it starts from", "Section 5.1"),
    "improves dvpo-gae": ("DVPO with GAE improves on the policy it starts from", "Section 5.1"),
    "matches dvpo-q": ("DVPO with A = Q matches or surpasses PPO, ReMax and GRPO", "Table 1"),
    "matches dvpo-gae": ("DVPO with GAE matches or surpasses PPO, ReMax and GRPO", "Table 1"),
    "dpo dvpo-q": ("DVPO with A = Q surpasses DPO", "Section 5.2"),
    "dpo dvpo-gae": ("DVPO with GAE surpasses DPO", "Section 5.2"),
    "kl": ("DVPO is above its start under each measured strength of the KL term", "Appendix H"),
    "scalar": ("as a judge of whole answers the GVM is comparable to a ScalarRM of the same data", "Section 6.1"),
    "critic": ("the GVM judges answers better than PPO's critic does", "Section 6.2"),
    "size": ("larger GVMs are more accurate", "Appendix E"),
    "source": ("targets from preferences are as good as targets from a reward model", "Appendix G"),
    "credit": ("the GVM's token values locate what is wrong, better than a ScalarRM's score spread over the tokens",
               "Section 6.1"),
    "cost": ("an update of DVPO takes less time and memory than one of PPO", "Table 7"),
    "speed": ("DVPO reaches its peak in fewer updates than PPO", "Appendix F"),
    "stable": ("DVPO is more stable than PPO", "Appendix F"),
    "tau": ("conditioning the GVM on other answers of the same policy (tau) helps", "Section 3.2"),
}  # fmt: skip
"""In the order of the report."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, where the paper makes it, what this run says, and the evidence in sentences."""

    key: str
    text: str
    where: str
    status: str
    evidence: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """One paragraph."""
        opening = f"{self.status[0].upper()}{self.status[1:]}: {self.text} ({self.where})."
        return " ".join([opening, *self.evidence])


def claims(book: Book) -> list[Claim]:
    """Every claim with what was found; those without evidence say so."""
    found: dict[str, tuple[list[str], list[str]]] = {key: ([], []) for key in CLAIMS}

    def add(key: str, verdict: str, sentence: str) -> None:
        found[key][0].append(verdict)
        found[key][1].append(sentence)

    for d in _directions(book):
        if d.claim in found:
            made = d.row(book)
            add(d.claim, made["verdict"], _difference(made))
    for made in cost.savings(book):
        add("cost", made["verdict"], _difference(made, "%"))
    for verdict, sentence in _credit(book):
        add("credit", verdict, sentence)
    for verdict, sentence in _stable(book):
        add("stable", verdict, sentence)
    for c in study.comparisons(book):
        if study.VARIANTS["tau1"] in c.left:
            told = verdicts.REPRODUCED if c.test.mean > 0 else verdicts.DIFFERS
            add("tau", told if c.told else verdicts.OTHER_SCALE, c.sentence())
    return [
        Claim(key, text, where, status(found[key][0]), found[key][1]) for key, (text, where) in CLAIMS.items()
    ]  # fmt: skip


def findings(book: Book) -> list[str]:
    """Every claim as a sentence with its evidence, those that hold first; the untested ones in one sentence."""
    found = claims(book)
    said = [claim.sentence() for state in STATES for claim in found if claim.status == state]
    untested = [f"{claim.text} ({claim.where})" for claim in found if claim.status == UNTESTED]
    return [*said, *(["Not tested here: " + "; ".join(untested) + "."] if untested else [])]


def status(found: Sequence[str]) -> str:
    """What verdicts say together about a claim."""
    good = sum(v in (verdicts.REPRODUCED, verdicts.WITHIN) for v in found)
    bad = sum(v == verdicts.DIFFERS for v in found)
    if not found:
        return UNTESTED
    if good == len(found):
        return HOLDS
    if bad == len(found):
        return NOT
    return PART if good else NOT if bad else UNTOLD


def _directions(book: Book) -> list[policies.Direction]:
    first = policies.directions(book, 1)
    dpo = [d for d in policies.directions(book, 2) if d.claim.startswith("dpo")]
    judged = [*values.scalar_tie(book), *values.critic_direction(book), *values.size_directions(book)]
    return [
        *first,
        *dpo,
        *policies.kl_directions(book),
        *judged,
        *values.source_direction(book),
        *pictures.peak_direction(book),
    ]


def _difference(made: Row, unit: str = "") -> str:
    places = 1 if unit or abs(made["measured"]) >= 2 else 3
    between = "" if made["ci95"] is None else " [{:+.{p}f}, {:+.{p}f}]".format(*made["ci95"], p=places)
    verdict = UNTOLD if made["verdict"] == verdicts.OTHER_SCALE else made["verdict"]
    what = made["metric"].partition(": ")[2].partition(" (paper")[0]
    return f"{made['method']}, {what}: {made['measured']:+.{places}f}{unit}{between}, {verdict}."


def _credit(book: Book) -> list[tuple[str, str]]:
    """The GVM beside chance and the ScalarRM, by their intervals."""
    table = extra.credit(book)
    rows = {r["method"]: r for r in table["rows"] if r["metric"].startswith("AUROC")} if table else {}
    gvm, rm = (rows.get(extra.CREDIT[name]) for name in ("gvm", "rm"))
    if gvm is None or rm is None:
        return []
    (low, high), (rm_low, rm_high) = gvm["ci95"], rm["ci95"]
    if gvm["seeds"] < verdicts.LEAST_SEEDS:
        verdict = verdicts.OTHER_SCALE
    elif low > max(0.5, rm_high):
        verdict = verdicts.REPRODUCED
    else:
        verdict = verdicts.DIFFERS if high < max(0.5, rm_low) else verdicts.OTHER_SCALE
    return [(verdict, f"AUROC of wrong tokens {gvm['measured']:.3f} [{low:.3f}, {high:.3f}] against "
                      f"{rm['measured']:.3f} [{rm_low:.3f}, {rm_high:.3f}] and chance 0.5.")]  # fmt: skip


def _stable(book: Book) -> list[tuple[str, str]]:
    """Collapsed runs of DVPO's two estimators against PPO's, by Fisher's exact test."""
    runs = {s.name: s for s in study.stability(book)}
    ppo = runs.get("PPO")
    found = []
    for name in ("DVPO (A = Q)", "DVPO (GAE)"):
        ours = runs.get(name)
        if ppo is None or ours is None:
            continue
        a, b = len(ours.collapsed), len(ppo.collapsed)
        p = study.fisher(a, ours.runs, b, ppo.runs)
        verdict = verdicts.OTHER_SCALE if p >= study.LEVEL else verdicts.REPRODUCED if a < b else verdicts.DIFFERS
        found.append((verdict, f"{a} of {ours.runs} runs of {name} collapsed, {b} of {ppo.runs} of PPO "
                               f"(Fisher's p {p:.2g})."))  # fmt: skip
    return found

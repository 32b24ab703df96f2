"""Keeps the routing index fresh while the mesh changes.

Owns: the index over the latest view, the classifier's training (in a thread: a decision never waits for
it), and what this node has under way where. Must not: decide (``core.routing`` does).
"""

from __future__ import annotations

import asyncio
from random import Random

from fieldmesh.core.catalogue import Index
from fieldmesh.core.classify import Classifier
from fieldmesh.core.effective import Rules
from fieldmesh.core.errors import FieldmeshError
from fieldmesh.core.model import Ask, MeshView, NodeId, Prompt
from fieldmesh.core.routing import Candidate, Decision, Need, choose
from fieldmesh.core.tally import Counts
from fieldmesh.core.traffic import Traffic

# Rough, and only used to compare nodes: a token has about four bytes of most scripts.
from fieldmesh.runtime import log

BYTES_PER_TOKEN = 4
MAX_TOKENS_PRIOR = 256
TRAINING_WAIT_S = 2.0
DECISIONS_MAX = 64

logger = log.get()


def need_of(ask: Ask, *, path: tuple[NodeId, ...] = (), hops_left: int = 1) -> Need:
    """What a request needs of the mesh, before anything was tried."""
    prompt = ask.prompt
    tokens = len(prompt.token_ids) or prompt_bytes(prompt) // BYTES_PER_TOKEN + 1
    return Need(
        profile=ask.target.profile,
        model=ask.target.model,
        domain=ask.target.domain,
        text=question(prompt),
        prompt_tokens=tokens,
        max_tokens=ask.sampling.max_tokens or MAX_TOKENS_PRIOR,
        path=path,
        hops_left=hops_left,
    )


def question(prompt: Prompt) -> str:
    """What the classifier should read: the prompt, or the latest thing that a user said."""
    if prompt.messages:
        asked = [message.content for message in prompt.messages if message.role == "user"]
        return asked[-1] if asked else prompt.messages[-1].content
    return prompt.text or ""


def prompt_bytes(prompt: Prompt) -> int:
    """Size of a prompt's text."""
    tools = prompt.tools.offered if prompt.tools else ()
    said = sum(len(m.content) + sum(len(c.arguments) for c in m.tool_calls) for m in prompt.messages)
    return len(prompt.text or "") + said + sum(len(t.description) + len(t.parameters) for t in tools)


class Router:
    """Routing over the latest view; belongs to one event loop."""

    def __init__(self, view: MeshView, *, rules: Rules, rng: Random) -> None:
        self.decisions: Counts[tuple[str, str]] = Counts(DECISIONS_MAX, ("other", "other"))
        self._index = Index.of(view, owners=rules.domains)
        self._rules = rules
        self._rng = rng
        self._traffic = Traffic()
        self._training: asyncio.Task[None] | None = None

    @property
    def index(self) -> Index:
        """What the mesh offers now."""
        return self._index

    def update(self, view: MeshView) -> None:
        """Route over this view from now on; retrain the classifier where the domains changed."""
        self._index = Index.of(view, self._index, self._rules.domains)
        if self._training is None and self._index.training_due:
            self._training = asyncio.create_task(self._train())

    def obey(self, rules: Rules) -> None:
        """Route by these rules from now on."""
        self._rules = rules
        self.update(self._index.view)

    def choose(self, need: Need, *, explain: bool = False) -> Decision:
        """Who should serve this. Raises what ``core.routing.choose`` raises.

        ``decisions`` counts by what the decision followed (profile, model, domain, classified, open, or
        fallback where nobody of the domain could serve) and what came of it (local, peer, refused).
        """
        asked = "profile" if need.profile else "model" if need.model else "domain" if need.domain else "open"
        try:
            made = choose(
                need,
                self._index,
                self._traffic,
                self._rng,
                policy=self._rules.policy,
                weights=self._rules.weights,
                explain=explain,
            )
        except FieldmeshError:
            self.decisions.add((asked, "refused"))
            raise
        reason = "fallback" if made.fallback else "classified" if asked == "open" and made.domain else asked
        chosen = made.candidates[0].member.id
        self.decisions.add((reason, "local" if chosen == self._index.view.local else "peer"))
        return made

    def begin(self, key: str, candidate: Candidate, need: Need) -> None:
        """The request of this key is with this candidate now."""
        self._traffic.begin(
            key, candidate.member, prompt_tokens=need.prompt_tokens, max_tokens=need.max_tokens
        )

    def end(self, key: str) -> None:
        """The request of this key is with nobody now."""
        self._traffic.end(key)

    async def settled(self, need: Need) -> None:
        """Return when this need can be decided well: a question that only its words describe waits for the
        classifier to know every domain, for a moment at most."""
        if self._training is not None and need.text and not (need.profile or need.model or need.domain):
            await asyncio.wait((self._training,), timeout=TRAINING_WAIT_S)

    async def close(self) -> None:
        """End the training that is under way."""
        if self._training is not None:
            self._training.cancel()
            await asyncio.wait((self._training,))

    async def _train(self) -> None:
        try:
            while self._index.training_due:
                domains = self._index.domains
                classifier = await asyncio.to_thread(Classifier.train, domains)
                self._index = self._index.with_classifier(classifier)
                logger.info("classifier_trained", domains=len(domains))
        finally:
            self._training = None

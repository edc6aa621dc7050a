"""A spaCy tagger trained in Ray workers, its gradients in step by a ``Synchronizer``.

    python examples/train_spacy.py --workers 2

Each worker has every n-th sentence. ``nlp.update(..., sgd=False)`` updates nothing and leaves the
gradients in the arrays of the tagger's layers; ``synchronizer.sync`` replaces them there by the sum
over all workers (spaCy's loss is a sum over words), and the optimizer takes them from there. The
losses of all steps are those of one process with all sentences, to 1e-3 relative, and so is the
accuracy. Needs colltensor[ray], scikit-learn and spacy.
"""

from __future__ import annotations

import sys
from typing import Any

import digits
import numpy as np
from train_thinc import gradients_of, parameters_of

import colltensor as col
from colltensor.gradients import Synchronizer

try:
    import spacy
    from spacy.training import Example
except ModuleNotFoundError as missing:
    sys.exit(f"this example needs spaCy ({missing.name} is missing): pip install spacy")

CORPUS = """
the/DET cat/NOUN sees/VERB a/DET dog/NOUN | a/DET bird/NOUN sings/VERB in/ADP the/DET tree/NOUN
she/PRON quickly/ADV reads/VERB the/DET old/ADJ book/NOUN | they/PRON walk/VERB to/ADP the/DET small/ADJ house/NOUN
he/PRON often/ADV drinks/VERB cold/ADJ water/NOUN | the/DET tall/ADJ tree/NOUN falls/VERB slowly/ADV
we/PRON find/VERB a/DET red/ADJ stone/NOUN | it/PRON rains/VERB on/ADP the/DET green/ADJ hill/NOUN
a/DET young/ADJ child/NOUN laughs/VERB loudly/ADV | you/PRON see/VERB the/DET river/NOUN from/ADP here/ADV
the/DET dog/NOUN runs/VERB after/ADP a/DET ball/NOUN | I/PRON never/ADV eat/VERB green/ADJ apples/NOUN
old/ADJ songs/NOUN sound/VERB sweet/ADJ | a/DET boat/NOUN sails/VERB over/ADP the/DET lake/NOUN
she/PRON writes/VERB a/DET long/ADJ letter/NOUN | the/DET wind/NOUN blows/VERB softly/ADV at/ADP night/NOUN
"""
WIDTH = {
    "width": 32,
    "depth": 1,
    "embed_size": 200,
    "window_size": 1,
    "maxout_pieces": 2,
    "subword_features": True,
}


def examples_for(nlp: Any) -> list[Example]:
    """The corpus as spaCy's examples."""
    sentences = [
        [pair.split("/") for pair in text.split()]
        for text in CORPUS.strip().replace("\n", " | ").split("|")
    ]
    made = []
    for sentence in sentences:
        words, tags = map(list, zip(*sentence, strict=True))
        made.append(
            Example.from_dict(
                spacy.tokens.Doc(nlp.vocab, words=words), {"words": words, "tags": tags}
            )
        )
    return made


def new_tagger(seed: int) -> tuple[Any, list[Example]]:
    """A blank pipeline with a small tagger, and the corpus."""
    spacy.util.fix_random_seed(seed)
    nlp = spacy.blank("en")
    tok2vec = {"@architectures": "spacy.HashEmbedCNN.v2", "pretrained_vectors": None, **WIDTH}
    nlp.add_pipe(
        "tagger", config={"model": {"@architectures": "spacy.Tagger.v2", "tok2vec": tok2vec}}
    )
    examples = examples_for(nlp)
    nlp.initialize(lambda: examples)
    return nlp, examples


def train(rank: int, world_size: int, steps: int) -> digits.Outcome:
    """Train on every ``world_size``-th sentence."""
    nlp, examples = new_tagger(rank)
    tagger = nlp.get_pipe("tagger")
    words = sum(len(example.reference) for example in examples)
    if world_size > 1:
        col.broadcast(parameters_of(tagger.model))
        synchronizer = Synchronizer(parameters_of(tagger.model), average=False)
    optimizer = nlp.create_optimizer()
    losses = []
    for _ in range(steps):
        found = nlp.update(examples[rank::world_size], drop=0.0, sgd=False)
        if world_size > 1:
            synchronizer.sync(gradients_of(tagger.model))
        tagger.finish_update(optimizer)
        losses.append(found["tagger"] / words)
    curve = np.array(losses)
    if world_size > 1:
        col.allreduce(curve)
    return digits.Outcome(curve.tolist(), float(nlp.evaluate(examples)["tag_acc"]))


if __name__ == "__main__":
    sys.exit(digits.main(train, tolerance=1e-3, steps=60))

"""Test weighted kNN against the official evaluation."""

import pytest
import torch
import torch.nn.functional as F

from helpers import golden_files, load_golden, requires_shared
from hf_regvit.evaluation.knn import knn_accuracy, knn_classify

pytestmark = requires_shared


@pytest.mark.parametrize("name", golden_files("knn"))
def test_full_training_set(name):
    golden, config = load_golden(name)
    train, labels = golden["in.train_features"], golden["in.train_labels"]
    test, truth = golden["in.test_features"], golden["in.test_labels"]
    scores = knn_classify(train, labels, test, k=config["nb_knn"], temperature=config["T"])
    accuracy = knn_accuracy(train, labels, test, truth, k=config["nb_knn"], temperature=config["T"])
    for k in config["nb_knn"]:
        torch.testing.assert_close(scores[k], golden[f"out.full.k{k}.probas"], atol=1e-5, rtol=0)
        assert torch.equal(scores[k].argmax(1), golden[f"out.full.k{k}.preds"])
        assert accuracy[k] == pytest.approx(golden[f"out.full.k{k}.accuracy"][0].item(), abs=1e-7)
    # knn_classify normalizes, so features that are already normalized give the same result.
    again = knn_classify(F.normalize(train, dim=1), labels, F.normalize(test, dim=1), k=config["nb_knn"])
    torch.testing.assert_close(again, scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", golden_files("knn"))
def test_few_shot_subsets(name):
    golden, config = load_golden(name)
    per_class = config["n_per_class"]
    ks = [k for k in dict.fromkeys([*config["nb_knn"], per_class]) if k <= per_class]
    tries = [int(key.split(".")[2].removeprefix("try")) for key in golden if key.endswith(".indices")]
    assert len(tries) == 2
    for attempt in tries:
        kept = golden[f"out.fewshot.try{attempt}.indices"]
        train, labels = golden["in.train_features"][kept], golden["in.train_labels"][kept]
        num_classes = int(golden["in.train_labels"].max()) + 1
        scores = knn_classify(train, labels, golden["in.test_features"], k=ks, num_classes=num_classes)
        for k in ks:
            torch.testing.assert_close(scores[k], golden[f"out.fewshot.try{attempt}.k{k}.probas"], atol=1e-5, rtol=0)
            assert torch.equal(scores[k].argmax(1), golden[f"out.fewshot.try{attempt}.k{k}.preds"])
            correct = (scores[k].argmax(1) == golden["in.test_labels"]).float().mean()
            assert correct.item() == pytest.approx(golden[f"out.fewshot.try{attempt}.k{k}.accuracy"][0].item())

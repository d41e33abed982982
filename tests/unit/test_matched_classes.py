"""Classes of other data, matched with a model's by name."""

import pytest
import torch

from ftexp.errors import ConfigError
from ftexp.evaluate.command import refuse
from ftexp.evaluation.matched_classes import MatchedClasses


def test_labels_become_the_models_and_samples_of_new_classes_are_excluded_and_counted():
    classes = MatchedClasses(["ant", "bee", "cow"], ["cow", "dog", "ant", "eel"])
    images = torch.arange(6.0).view(6, 1, 1, 1)
    batches = [(images, torch.tensor([0, 1, 2, 1, 3, 0])), (images[:2], torch.tensor([1, 3]))]
    ((kept, labels),) = classes.batches(batches)
    assert kept.flatten().tolist() == [0, 2, 5]
    assert labels.tolist() == [2, 0, 2]
    assert (classes.missing, classes.new) == (["bee"], ["dog", "eel"])
    assert classes.excluded == {"dog": 3, "eel": 2}


def test_data_without_any_of_the_classes_are_refused_with_both_sides_names():
    with pytest.raises(ConfigError, match=r"they have 0, 1, 2, 3, 4 and 5 more, and the model knows ant, bee; classes"):
        MatchedClasses(["ant", "bee"], [str(number) for number in range(10)])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.image_size=64", "set by the trained run"),
        ("data.shuffle_window=3", "is for training"),
        ("optim.lr=1", "optim.lr=1 is not used: choose from run, checkpoint"),
        ("-m", "-m is not used"),
    ],
)
def test_what_is_not_read_beside_other_data_is_refused(word, told):
    with pytest.raises(ConfigError, match=told):
        refuse(["data=digits", word])
    refuse(["data=image_folder", "data.root=photos", "data.on_bad_sample=skip", "plugins=[mine]"])

"""The linear probe: what a linear classifier reads from representations (App. C.2).

accuracy = linear_probe(train, train_labels, test, test_labels)
"""

import joblib
import numpy as np
from sklearn.multiclass import OneVsOneClassifier
from sklearn.svm import LinearSVC


def principal_components(
    train: np.ndarray, test: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both (N, D) in the basis of the training split's `most` leading principal components."""
    mean = train.mean(axis=0)
    basis = np.linalg.eigh((train - mean).T @ (train - mean))[1][:, ::-1][:, :most]
    return (train - mean) @ basis, (test - mean) @ basis


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Test accuracy in percent of a one-versus-one linear SVM on representations (N, D), App. C.2.

    Standardised on the training split, by a deviation of at least 0.1, below which a unit is
    inactive: blown up to 1, the rounding noise of a collapsed level reads as classes. More than 512
    dimensions are taken in their 256 leading principal components, where LIBLINEAR takes a second a
    pair of classes instead of a minute. Of more than 20 classes each pair has few images: then at
    most a quarter as many components, and LIBLINEAR's own tolerance.
    """
    mean = train.mean(axis=0, dtype=np.float64).astype(train.dtype)
    std = np.maximum(train.std(axis=0, dtype=np.float64), 0.1).astype(train.dtype)
    train, test = (train - mean) / std, (test - mean) / std
    classes = len(np.unique(train_labels))
    many = classes > 20
    most = max(1, len(train) * 2 // classes // 4) if many else 512
    if train.shape[1] > min(most, 512):
        train, test = principal_components(train, test, min(most, 256))
    svm = OneVsOneClassifier(LinearSVC(dual=False, tol=1e-2 if many else 1e-4))
    with joblib.parallel_config("threading", n_jobs=-1):  # liblinear lets other threads run
        svm.fit(train, train_labels)
    # The scores of all pairs (19,900 of 200 classes) are held for a part of the images at a time.
    parts = range(0, len(test), 500)
    predicted = np.concatenate([svm.predict(test[i : i + 500]) for i in parts])
    return 100 * float((predicted == test_labels).mean())

"""The linear probe: what a linear classifier reads from representations (App. C.2).

accuracy = linear_probe(train, train_labels, test, test_labels)
"""

import numpy as np


def checked(z: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A split as arrays, (N, D) and labels (N,); ValueError for other shapes or kinds of labels."""
    z, labels = np.asarray(z), np.array(np.asarray(labels).tolist())  # of objects: what they hold
    named = labels.dtype.kind in "biuU" or (labels.dtype.kind == "f" and not (labels % 1).any())
    if not named or z.ndim != 2 or labels.shape != z.shape[:1]:
        raise ValueError(f"not (N, D) and N classes: {z.shape} and {labels.dtype} {labels.shape}")
    return z, labels


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> float:
    """Test accuracy in percent of a one-versus-one linear SVM on representations (N, D), App. C.2.

    Standardised on the training split, by a deviation of at least 0.1, below which a unit is
    inactive: blown up to 1, the rounding noise of a collapsed level reads as classes. More than 512
    dimensions are taken in their 256 leading principal components, where LIBLINEAR takes a second a
    pair of classes instead of a minute. Of more than 20 classes each pair has few images: then at
    most a quarter as many components, and LIBLINEAR's own tolerance. Integers and half precision
    are taken in float32 or better. ValueError for splits that are not finite or do not match.
    """
    import joblib  # here: half of what a command's --help would wait for
    from sklearn.decomposition import PCA
    from sklearn.multiclass import OneVsOneClassifier
    from sklearn.svm import LinearSVC

    train, train_labels = checked(train, train_labels)
    test, test_labels = checked(test, test_labels)
    names = (train_labels.dtype.kind == "U") + (test_labels.dtype.kind == "U")
    if train.shape[1] != test.shape[1] or names == 1:
        raise ValueError("the splits differ in their dimensions or in the kind of their labels")
    dtype = np.result_type(train, test, np.float32)
    mean = train.mean(axis=0, dtype=np.float64).astype(dtype)
    std = np.maximum(train.std(axis=0, dtype=np.float64), 0.1).astype(dtype)
    train, test = (train - mean) / std, (test - mean) / std
    classes = len(np.unique(train_labels))
    many = classes > 20
    most = max(1, len(train) * 2 // classes // 4) if many else 512
    if train.shape[1] > min(most, 512):
        pca = PCA(min(most, 256, len(train)), svd_solver="covariance_eigh")
        train, test = pca.fit_transform(train), pca.transform(test)
    svm = OneVsOneClassifier(LinearSVC(dual=False, tol=1e-2 if many else 1e-4))
    with joblib.parallel_config("threading", n_jobs=-1):  # liblinear lets other threads run
        svm.fit(train, train_labels)
    # The scores of all pairs (19,900 of 200 classes) are held for a part of the images at a time.
    parts = range(0, len(test), 500)
    predicted = np.concatenate([svm.predict(test[i : i + 500]) for i in parts])
    return 100 * float((predicted == test_labels).mean())

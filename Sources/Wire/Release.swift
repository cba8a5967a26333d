// SPDX-License-Identifier: Apache-2.0
/// What a release is called. The Swift programs and clients read it here, setuptools and the Python client read
/// `__version__` of the Python package, and `make lint` demands that they are equal.
public enum Release {
    public static let version = "0.1.0"
}

"""Signatures of bundles by an elliptic-curve key, through `model-signing`. The public key travels in the bundle."""

from pathlib import Path
from typing import Any

from dvpo.errors import InputError
from dvpo.files import sha256_file
from reproduce.bundles.manifest import KEY, SIGNATURE, Difference, Manifest

_HOW = "make one with: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"


def public_key_of(private_key: Path) -> bytes:
    """The PEM public key that belongs to a PEM private key. Raises InputError for a file that is none."""
    _library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(private_key.read_bytes(), None)
    except OSError as error:
        raise InputError(f"{private_key}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{private_key}: not an unencrypted PEM private key; {_HOW}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in ("secp256r1", "secp384r1", "secp521r1"):
        raise InputError(f"{private_key}: not a key of a NIST curve; {_HOW}")
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def sign(folder: Path, private_key: Path) -> None:
    """Writes `bundle.sig` over every other file of the bundle."""
    model_signing = _library()
    signature = folder / SIGNATURE
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[signature.name], ignore_git_paths=False)
    config = model_signing.signing.Config().set_hashing_config(hashing)
    config.use_elliptic_key_signer(private_key=private_key).sign(folder, signature)


def check_signature(folder: Path, manifest: Manifest, public_key: Path | None) -> list[Difference]:
    """Whether the signature is whole and made with the key in the bundle, and that key the expected one.

    Raises InputError where `public_key` is given for an unsigned bundle, or `model-signing` is not installed.
    """
    if manifest.signed_by is None:
        if public_key is not None:
            raise InputError(f"{folder}: the bundle is not signed; leave --public-key out to check its digests alone")
        return []
    if public_key is not None and not public_key.is_file():
        raise InputError(f"{public_key}: no such file; give the signer's public key (PEM)")
    if sha256_file(folder / KEY) != manifest.signed_by:
        return [Difference(KEY, "not the key that the manifest names")]
    if public_key is not None and public_key.read_bytes().split() != (folder / KEY).read_bytes().split():
        return [Difference(SIGNATURE, f"made with another key than {public_key}")]
    model_signing = _library()
    from model_signing._signing.sign_sigstore_pb import Signature

    path = folder / SIGNATURE
    try:
        # A byte in which two spellings of one signature differ is a changed byte too.
        if Signature.read(path).bundle.to_json().encode() != path.read_bytes():
            return [Difference(SIGNATURE, "it was changed (not in the form that the signing library writes)")]
        hashing = model_signing.hashing.Config().set_ignored_paths(paths=[path.name], ignore_git_paths=False)
        verifier = model_signing.verifying.Config().set_hashing_config(hashing)
        verifier.use_elliptic_key_verifier(public_key=folder / KEY).verify(folder, path)
    except Exception as error:  # a changed signature fails in whatever way its parts are read
        why = " ".join(str(error).split())[:150] or type(error).__name__
        return [Difference(SIGNATURE, f"it does not sign this bundle ({why})")]
    return []


def _library() -> Any:
    try:
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise InputError(f"signatures need the package {error.name}: pip install '.[sign]'") from error
    return model_signing

"""``nnfuze bundle``: who made a bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from nnfuze_tvm.cli.options import BundlePath

POSITION = 9
_EXAMPLES = """
Examples:

[bold]openssl genpkey -algorithm ed25519 -out key.pem[/bold]
[bold]openssl pkey -in key.pem -pubout -out key.pub[/bold]
A key to sign with, and the one to give away.

[bold]nnfuze bundle sign out --key key.pem[/bold]
Sign a bundle.

[bold]nnfuze run out --trust key.pub --input audio=clip.npy[/bold]
Run it if nobody else made or changed it.
"""

app = typer.Typer(
    help="Sign bundles for those who load them with --trust.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def group() -> None:
    """Sign bundles for those who load them with --trust."""


@app.command("sign")
def sign_command(
    bundle: BundlePath,
    *,
    key: Annotated[str, typer.Option(help="Private key: Ed25519 as PEM, without a password.", show_default=False)],
) -> None:
    """Sign a bundle: whoever has the public key can tell that it is as it is now."""
    from nnfuze_tvm.jobs import bundles

    print(f"signature: {bundles.sign(bundle, key)}")

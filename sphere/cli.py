"""The command line: `sphere VERB`. Each verb reads the settings, calls one thing, and reports it."""

from __future__ import annotations

import errno
import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import sphere
from sphere.archive import Archive
from sphere.conf import logs
from sphere.conf.errors import SettingsError, SphereError
from sphere.conf.loading import from_dict, load_archive
from sphere.conf.private import keep_private, make_private
from sphere.conf.settings import Settings
from sphere.interrupts import LINE, STATUS, Interrupts, noted
from sphere.output import Format, PathArgument, format_options, write_rows

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Verbs(click.Group):
    """A click group that turns every SphereError, and what the system refuses, into one clear line and a status."""

    def invoke(self, ctx: click.Context) -> object:
        with noted() as interrupts:
            try:
                return self._invoke(ctx, interrupts)
            except click.exceptions.Exit:
                raise
            except KeyboardInterrupt:
                pass
            except Exception:  # what became of Ctrl-C in somebody's library
                if not interrupts.came():
                    raise
        click.echo(LINE, err=True)
        return ctx.exit(STATUS)

    def _invoke(self, ctx: click.Context, interrupts: Interrupts) -> object:
        try:
            return super().invoke(ctx)
        except SphereError as error:
            if interrupts.came():
                raise
            click.echo(f"sphere: {error}", err=True)
            ctx.exit(error.exit_status)
        except OSError as error:  # a folder that cannot be written to, a full disk
            if interrupts.came() or error.errno == errno.EPIPE:  # who read our output went away: click ends quietly
                raise
            _name(error)
            ctx.exit(1)

    def main(self, *arguments: Any, **options: Any) -> Any:
        """As click has it; what the system refuses before there is a verb (--help onto a full disk) is one line too."""
        try:
            return super().main(*arguments, **options)
        except OSError as error:
            _name(error)
            sys.exit(1)


def _name(error: OSError) -> None:
    logging.getLogger("sphere").debug("where it happened", exc_info=True)
    where = f"{error.filename}: " if error.filename else ""
    click.echo(f"sphere: {where}{error.strerror or error}", err=True)


class Late(click.Command):
    """A verb of another module, which is imported when the verb is called: every child of `sphere serve` reads this
    module, and a receiver is to load nothing that it does not need."""

    def __init__(self, name: str, module: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self._module = module

    def load(self) -> click.Command:
        """The verb itself."""
        command = getattr(import_module(self._module), self.name or "")
        assert isinstance(command, click.Command)
        return command

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """The context of the verb itself, which click then goes on with."""
        return self.load().make_context(*arguments, **options)


@click.group(cls=Verbs, context_settings=CONTEXT)
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Settings file (default: $SPHERE_CONFIG, else ./sphere.toml).",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="What is logged to standard error (serve: info unless given).",
)
@click.version_option(sphere.__version__, prog_name="sphere")
@click.pass_context
def main(ctx: click.Context, config: Path | None, log_level: logs.Level) -> None:
    """SPHERE, a research PACS: receives DICOM, keeps it on disk or HDFS, catalogues it with Spark in Delta Lake.

    \b
    Examples:
      sphere init archive && cd archive
      sphere serve
      sphere import /mnt/cd
      sphere extract
      sphere sql "SELECT Modality, count(*) FROM instances GROUP BY Modality"
    """
    source = ctx.get_parameter_source("log_level")
    chosen = (
        "info" if source is not None and source.name == "DEFAULT" and ctx.invoked_subcommand == "serve" else log_level
    )
    logs.configure(chosen)
    keep_private()
    ctx.obj = config


def settings_of(ctx: click.Context) -> Settings:
    """The settings of the archive that this call works with."""
    return load_archive(ctx.obj)


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--root", default="file:storage", show_default=True, help="storage.root: file:, hdfs:// or webhdfs:// URL."
)
@click.option(
    "--catalog-root",
    default="",
    help="catalog.root: file: or hdfs:// URL; by default below --root, with webhdfs:// file:catalog.",
)
@click.option("--ae-title", default="SPHERE", show_default=True, help="archive.ae_title.")
@click.option("--port", default=11112, show_default=True, help="dimse.port.")
@click.option("--web-port", default=8080, show_default=True, help="web.port.")
def init(folder: Path, root: str, catalog_root: str, ae_title: str, port: int, web_port: int) -> None:
    """Make an archive folder with a commented sphere.toml and its storage.

    \b
    Examples:
      sphere init archive
      sphere init archive --root hdfs://namenode:8020/sphere --port 104
    """
    from sphere.ingest.storage import open_storage
    from sphere.template import render

    file = folder / "sphere.toml"
    if file.exists():
        raise SettingsError(f"{file} exists already; edit it, or choose another folder")
    values = {"archive.ae_title": ae_title, "dimse.port": port, "web.port": web_port, "storage.root": root}
    if catalog_root or root.startswith("webhdfs:"):  # Delta tables cannot be read over webhdfs://
        values["catalog.root"] = catalog_root or "file:catalog"
    nested: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    settings = from_dict(nested, base=folder.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    make_private(settings.archive.state_dir)
    open_storage(settings.storage.root, user=settings.storage.user)
    file.write_text(render(values), encoding="utf-8")
    click.echo(f"{file} written. Next: sphere --config {file} serve")


@main.command()
@click.pass_context
def serve(ctx: click.Context) -> None:
    """Receive and answer DICOM and DICOMweb, and extract what lands, until SIGTERM or Ctrl-C.

    \b
    Example:
      sphere --config archive/sphere.toml serve
    """
    from sphere.serve import Supervisor, leave_at_sigterm

    leave_at_sigterm()
    sys.exit(Supervisor(settings_of(ctx), announce=click.echo).run())


@main.command("import")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=PathArgument())
@click.option("--only-dicom", is_flag=True, help="Leave out files that are not DICOM, instead of quarantining them.")
@click.pass_context
def import_(ctx: click.Context, paths: tuple[Path, ...], only_dicom: bool) -> None:
    """Store files and whole folders, byte for byte; `sphere extract` then catalogues them.

    A file that cannot be stored is named, the others go on, and the exit status is 1. What is stored already, byte for
    byte, is skipped, and with --only-dicom what is no DICOM.

    \b
    Examples:
      sphere import /mnt/cd
      sphere import --only-dicom scan1.dcm downloads/
    """
    from sphere.progress import import_progress

    archive = Archive(settings_of(ctx))
    counts = import_progress(archive.import_files(paths, only_dicom=only_dicom), paths)
    click.echo(
        f"{counts.stored} stored, {counts.skipped} skipped, {counts.failed} failed ({counts.bytes / 1e6:.1f} MB)"
    )
    sys.exit(1 if counts.failed else 0)


@main.command()
@click.pass_context
def extract(ctx: click.Context) -> None:
    """Catalogue everything that landed and is not yet in the Delta tables: one incremental batch.

    Safe to interrupt and to repeat: landing is at least once, the catalog is exactly once.

    \b
    Example:
      sphere extract
    """
    from sphere.jobs.progress import step_bar

    archive = Archive(settings_of(ctx))
    with step_bar() as on_step:
        report = archive.extract(on_step=on_step)
    click.echo(str(report))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """What is here, what is waiting for extraction, and what failed.

    \b
    Examples:
      sphere status
      sphere status --json
    """
    report = Archive(settings_of(ctx)).status()
    click.echo(report.to_json() if as_json else str(report))
    sys.exit(1 if report.problem else 0)


@main.command()
@click.pass_context
def ship(ctx: click.Context) -> None:
    """Ship what the spool holds to the storage, once; `sphere serve` does so all the time.

    Bundles that a receiver is writing stay until they are sealed. Exit status 1 when something could not be shipped.

    \b
    Example:
      sphere ship
    """
    from sphere.ingest.shipping import Shipper, exclusive

    settings = settings_of(ctx)
    with exclusive(settings):
        done = Shipper(settings).round()
    click.echo(f"{done.bundles} bundles shipped ({done.bytes / 1e6:.1f} MB), {done.damaged} damaged")
    if done.error:
        click.echo(done.error, err=True)
    sys.exit(1 if done.error or done.damaged else 0)


@main.command()
@click.argument("bundles", metavar="[BUNDLE]...", nargs=-1)
@click.pass_context
def verify(ctx: click.Context, bundles: tuple[str, ...]) -> None:
    """Read sealed bundles whole: every digest, the end of the tar, and that the journal says the same.

    Without BUNDLE (a path below the storage root) all of them, those of the spool too. What is wrong is named, one line
    each, and the exit status is 1.

    \b
    Examples:
      sphere verify
      sphere verify bundles/2026/03/01/20260301T080000000000Z-host-1-0a1b2c3d.tar
    """
    from sphere.ingest.journal import Landed
    from sphere.ingest.recovery import verify as verify_bundle
    from sphere.ingest.spool import open_readable

    storage = open_readable(settings_of(ctx))
    checked = members = wrong = 0
    for bundle in bundles or [state.bundle for state in Landed(storage).bundles() if state.sealed]:
        found = verify_bundle(storage, bundle)
        checked, members, wrong = checked + 1, members + found.members, wrong + bool(found.problems)
        for problem in found.problems:
            click.echo(f"{bundle}: {problem}", err=True)
    click.echo(f"{checked} bundles with {members} members read, {wrong} of them not as promised")
    sys.exit(1 if wrong else 0)


@main.command()
@click.argument("statement", metavar='"SELECT ..."')
@format_options
@click.pass_context
def sql(ctx: click.Context, statement: str, format_: Format, output: Path | None) -> None:
    """Ask the catalog in Spark SQL: instances, series, studies, patients, quarantine, conflicts, tombstones, bundles,
    audit, annotations. A statement that does anything but ask (SELECT, DESCRIBE, SHOW, EXPLAIN) is refused.

    \b
    Examples:
      sphere sql "SELECT Modality, count(*) AS n FROM series GROUP BY Modality"
      sphere sql "SELECT * FROM studies WHERE StudyDate >= '2024-01-01'" --format csv -o studies.csv
    """
    if format_ == "parquet" and output is None:
        raise click.UsageError("--format parquet needs -o FILE")
    write_rows(Archive(settings_of(ctx)).sql(statement), format=format_, output=output)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example:
      eval "$(sphere completion bash)"
    """
    from click.shell_completion import get_completion_class

    factory = get_completion_class(shell)
    assert factory is not None  # click knows the three shells of the choice
    click.echo(factory(main, {}, "sphere", "_SPHERE_COMPLETE").source())


for verb in (
    Late("peers", "sphere.peers_command", "List the peers of the settings, and what each answers to C-ECHO."),
    Late("echo", "sphere.dimse_commands", "Ask a peer whether it answers (C-ECHO)."),
    Late("store", "sphere.store_command", "Send files and folders, or instances of the archive, to a peer (C-STORE)."),
    Late(
        "find",
        "sphere.dimse_commands",
        "Ask a peer what it has (C-FIND), or without PEER this archive itself, no server needed.",
    ),
    Late("move", "sphere.retrieve_commands", "Have a peer send instances to an AE title that it knows (C-MOVE)."),
    Late("get", "sphere.retrieve_commands", "Bring instances from a peer straight into the archive (C-GET)."),
    Late("token", "sphere.token_commands", "API tokens for DICOMweb: made here, shown once, kept as hashes only."),
    Late(
        "cohort",
        "sphere.cohort_commands",
        "Named lists of studies, series or patients, for `sphere token create --role researcher --cohort`.",
    ),
    Late(
        "delete",
        "sphere.delete_commands",
        "Show studies, series and instances no more; their bytes stay until compaction.",
    ),
    Late("compact", "sphere.compact_command", "Erase the bytes of what was deleted a while ago."),
    Late(
        "undelete",
        "sphere.delete_commands",
        "Show deleted studies, series and instances again.",
    ),
    Late("annotate", "sphere.annotate_commands", "Link files of any type to studies, series and instances."),
):
    main.add_command(verb)


if __name__ == "__main__":
    main(prog_name="sphere")

"""Sharded training across processes: losses as under DDP, HSDP, and bitwise identical results after a resume."""


def test_ranks_train_under_fsdp_and_hsdp_as_under_ddp_and_resume_to_the_same_bits(preloaded, tmp_path):
    printed = preloaded.run("sharded_ranks", "3", "4", MEETING=str(tmp_path / "meeting"))
    assert printed == "".join(f"{world} ranks agree\n" for world in (3, 4))

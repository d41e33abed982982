"""Sharded checkpoints across processes: 2 save, 4 and 1 resume; HSDP, corruption, and writers that fail or die."""


def test_processes_of_any_number_resume_bitwise_what_others_saved_in_shards(preloaded, tmp_path):
    assert preloaded.run("saving_ranks", str(tmp_path)) == "as it was saved\n"


def test_shards_on_s3_are_written_by_each_process_and_read_in_slices(preloaded, s3):
    assert preloaded.run("saving_ranks", s3.uri) == "as it was saved\n"


def test_ranks_of_any_number_go_on_from_shards_in_memory_also_where_a_node_is_lost(preloaded):
    assert preloaded.run("snapshot_ranks") == "as it was kept\n"

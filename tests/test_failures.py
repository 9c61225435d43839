"""The failures that are handled, and the tests that hold each; `FAILURES.md` is the same list for readers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FAILURES = TESTS / "FAILURES.md"

BOUNDARY, RUN, CONFIG = "test_cli_boundary", "test_cli_run", "test_config"
DOWNLOAD = "test_hub_download"
HUB, HEADER, CHECKPOINT = "test_hub_source_model", "test_checkpoint_safetensors_header", "test_checkpoint"
FAULTS, PREPARED, FILES = (
    "test_substitutes_preparation_faults",
    "test_substitutes_prepared_model",
    "test_files_atomic_write",
)
LIBRARY, PRETRAINED = "test_decoding_text_library", "test_modeling_pretrained"
TEMPLATE = "test_modeling_chat_template"
EIGHT_BIT = "test_checkpoint_eight_bit"
STAMP = "test_substitutes_source_stamp"
ENGINE, TRUST, OPENING = "test_decoding_engine", "test_session_trust", "test_session_open"
SAME = "test_checkpoint_repository::test_the_answer_is_the_librarys"
NAMED = "test_checkpoint_repository::test_a_refusal_names_the_thing_and_comes_before_weights_are_read"
REFUSED = "test_cli_failures::test_a_bad_model_is_refused_in_one_line_and_leaves_nothing"

COVERED = [
    ("F01", f"{BOUNDARY}::test_usage_errors_name_what_is_wrong"),
    ("F01", f"{BOUNDARY}::test_nearest_flag_is_suggested"),
    ("F02", f"{CONFIG}::test_bad_flag_is_named_with_its_range"),
    ("F02", f"{BOUNDARY}::test_usage_errors_name_what_is_wrong"),
    ("F03", f"{CONFIG}::test_bad_flag_is_named_with_its_range"),
    ("F04", f"{CONFIG}::test_bad_flag_is_named_with_its_range"),
    ("F05", f"{CONFIG}::test_bad_flag_is_named_with_its_range"),
    ("F06", f"{RUN}::test_bad_piped_prompt"),
    ("F06", f"{RUN}::test_bad_prompt_argument"),
    ("F07", "test_session_answers::test_a_prompt_without_room_is_refused"),
    ("F07", "test_session_prompt::test_a_prompt_longer_than_the_model_is_refused_before_anything_is_loaded"),
    ("F07", "test_session_prompt::test_a_given_context_wins_and_a_prompt_beyond_it_is_refused_first"),
    (
        "F07",
        "test_planning_prompt::test_a_prompt_that_the_budget_cannot_hold_is_told_what_would_do",
    ),
    ("F08", "test_hub_model_name::test_names"),
    ("F10", f"{HUB}::test_unknown_model_and_revision"),
    ("F11", f"{HUB}::test_unknown_model_and_revision"),
    ("F12", f"{HUB}::test_models_that_cannot_be_run_cost_no_download"),
    ("F12", REFUSED),
    ("F13", f"{HUB}::test_wrong_token_is_reported_by_its_source_never_its_value"),
    ("F14", f"{HUB}::test_refusals_before_anything_is_kept"),
    ("F15", f"{HUB}::test_refusals_before_anything_is_kept"),
    ("F16", f"{DOWNLOAD}::test_f16_retry_after_is_heeded"),
    ("F16", f"{DOWNLOAD}::test_f16_too_long_a_wait_is_reported_and_not_waited_for"),
    ("F17", f"{DOWNLOAD}::test_f16_to_f18_answers_that_pass"),
    ("F18", f"{DOWNLOAD}::test_f16_to_f18_answers_that_pass"),
    ("F19", f"{HUB}::test_refused_connection"),
    ("F19", f"{DOWNLOAD}::test_f19_permanent_errors_end_after_the_bound"),
    ("F20", f"{DOWNLOAD}::test_f20_f27_dropped_connections_are_continued_where_they_broke"),
    ("F20", f"{DOWNLOAD}::test_f20_a_connection_that_stays_silent_is_given_up_with_what_is_there"),
    ("F21", f"{DOWNLOAD}::test_f21_a_flipped_byte_never_gets_its_name"),
    ("F21", f"{DOWNLOAD}::test_f21_a_damaged_beginning_of_an_earlier_run_is_fetched_again"),
    ("F22", f"{DOWNLOAD}::test_f22_a_body_of_another_length"),
    ("F22", f"{DOWNLOAD}::test_f22_a_size_that_is_a_lie"),
    ("F23", f"{HUB}::test_refusals_before_anything_is_kept"),
    ("F24", f"{DOWNLOAD}::test_f24_the_branch_moves_while_it_is_fetched"),
    ("F25", f"{HUB}::test_offline_with_a_cold_and_a_warm_cache"),
    ("F26", f"{DOWNLOAD}::test_f26_the_token_goes_to_the_hub_and_not_to_its_storage"),
    ("F27", f"{DOWNLOAD}::test_f20_f27_dropped_connections_are_continued_where_they_broke"),
    ("F28", f"{DOWNLOAD}::test_f28_a_read_only_cache_that_is_complete_is_used"),
    ("F30", f"{HEADER}::test_damage_is_reported_by_name"),
    ("F30", REFUSED),
    ("F31", f"{HEADER}::test_damage_is_reported_by_name"),
    ("F31", REFUSED),
    ("F32", f"{HEADER}::test_damage_is_reported_by_name"),
    ("F32", REFUSED),
    ("F33", f"{HEADER}::test_damage_is_reported_by_name"),
    ("F34", f"{HEADER}::test_damage_is_reported_by_name"),
    ("F35", f"{HEADER}::test_damage_is_reported_by_name"),
    ("F35", REFUSED),
    ("F36", f"{HEADER}::test_bombs_cost_little"),
    ("F37", f"{FAULTS}::test_weights_that_are_not_finite"),
    ("F37", REFUSED),
    ("F38", "test_checkpoint_confinement::test_index_cannot_lead_out"),
    ("F38", REFUSED),
    ("F39", "test_checkpoint_confinement::test_links_out_of_a_snapshot_are_refused"),
    ("F39", "test_checkpoint_confinement::test_hub_cache_links_to_its_own_blobs_only"),
    ("F40", "test_files_regular_file::test_special_files_are_refused_without_waiting"),
    ("F40", REFUSED),
    ("F41", "test_checkpoint_geometry::test_tensors_that_do_not_fit_are_named"),
    ("F41", REFUSED),
    ("F42", "test_checkpoint_geometry::test_tensors_that_do_not_fit_are_named"),
    ("F42", REFUSED),
    ("F43", f"{CHECKPOINT}::test_config_that_rules_the_model_out"),
    ("F43", REFUSED),
    ("F44", "test_checkpoint_geometry::test_mixtures_of_experts_are_refused_as_such"),
    ("F44", f"{OPENING}::test_a_model_of_another_kind_is_refused_before_anything_is_written"),
    ("F44", REFUSED),
    ("F45", "test_modeling_pretrained::test_code_in_a_models_directory_is_never_run"),
    ("F45", REFUSED),
    ("F46", "test_modeling_pretrained::test_a_prompt_with_a_token_beyond_the_tables_is_refused"),
    ("F46", REFUSED),
    ("F47", f"{CHECKPOINT}::test_config_that_rules_the_model_out"),
    ("F47", REFUSED),
    ("F50", f"{FAULTS}::test_killed_at_every_step_then_continued_to_the_same_bytes"),
    ("F51", f"{FAULTS}::test_interrupted_at_each_layer_then_continued_to_the_same_bytes"),
    ("F51", f"{BOUNDARY}::test_sigterm_outside_an_answer"),
    ("F52", f"{FAULTS}::test_disk_fault_while_remaking_leaves_the_earlier_set_usable"),
    ("F52", f"{FAULTS}::test_refused_remaking_leaves_the_earlier_set_as_it_is"),
    ("F53", f"{FILES}::test_failure_leaves_the_old_file_and_no_other"),
    ("F54", f"{FAULTS}::test_a_second_preparation_waits_and_finds_it_done"),
    ("F55", f"{FAULTS}::test_lock_of_a_dead_process_does_not_block"),
    ("F55", f"{FAULTS}::test_file_system_without_locks"),
    ("F56", f"{FILES}::test_data_is_on_disk_before_the_name_and_the_name_before_the_return"),
    ("F57", f"{PREPARED}::test_damaged_layer_names_file_hashes_and_repair"),
    ("F57", f"{TRUST}::test_a_damaged_substitute_is_repaired_to_the_same_bytes_and_nothing_else_is_made"),
    ("F58", "test_cli_failures::test_a_set_moved_to_another_models_place_is_not_taken_for_it"),
    ("F59", "test_substitutes_manifest::test_manifest_is_strict"),
    ("F59", "test_cli_failures::test_a_bad_manifest_is_refused_before_anything_is_loaded"),
    ("F60", "test_cli_failures::test_a_source_that_changed_is_never_paired_with_old_substitutes"),
    ("F60", f"{OPENING}::test_weights_written_again_are_not_paired_with_old_substitutes"),
    ("F61", f"{FILES}::test_mode_follows_the_umask"),
    (
        "F63",
        f"{TRUST}::test_a_target_file_that_changes_while_answering_ends_the_answer_before_its_next_token",
    ),
    ("F63", f"{TRUST}::test_a_target_file_that_changes_while_loading_gives_no_session"),
    ("F64", f"{TRUST}::test_a_disk_that_fails_while_streaming_is_named"),
    ("F70", f"{OPENING}::test_a_budget_too_small_names_one_that_works"),
    ("F72", "test_session_oom::test_opening_tells_a_shortage"),
    ("F72", "test_session_oom::test_answering_tells_a_shortage_and_the_session_lives_on"),
    ("F73", f"{OPENING}::test_memory_stays_within_the_budget"),
    ("F74", "test_session_oom::test_for_a_gpu_layers_are_pinned_as_far_as_host_memory_goes"),
    ("F74", "test_cli_run::test_what_did_not_go_as_planned_stays_on_the_screen"),
    ("F76", f"{OPENING}::test_a_gpu_that_is_not_there_is_not_replaced_silently"),
    ("F80", f"{ENGINE}::test_nothing_comes_after_an_end_token_wherever_it_falls"),
    ("F81", f"{ENGINE}::test_the_limit_is_met_exactly_wherever_it_falls"),
    ("F82", "test_decoding_text::test_stop_strings_are_found_as_in_the_whole_text"),
    ("F82", "test_decoding_text::test_characters_split_over_tokens_come_whole"),
    ("F83", f"{ENGINE}::test_a_draft_that_is_always_wrong_gives_one_token_a_pass"),
    ("F83", "test_lossless::test_a_draft_of_noise_changes_no_token_and_gains_nothing"),
    ("F84", "test_lossless::test_a_damaged_draft_changes_no_token"),
    ("F85", f"{ENGINE}::test_logits_that_are_not_finite_stop_before_a_token_is_shown"),
    ("F87", f"{RUN}::test_ctrl_c_keeps_what_is_there"),
    ("F87", f"{BOUNDARY}::test_reader_that_leaves_early_is_no_error"),
    ("F87", f"{BOUNDARY}::test_full_disk_on_stdout"),
    ("F88", "test_lossless::test_a_draft_that_is_the_target_is_accepted_whole"),
    ("F90", f"{RUN}::test_pipe_keeps_bytes_and_terminal_escapes_them"),
    ("F91", f"{HEADER}::test_damage_is_reported_by_name"),
    ("F91", REFUSED),
    ("F91", "test_cli_models::test_control_characters_in_a_directorys_name_do_not_reach_the_terminal"),
    ("F94", f"{FILES}::test_planted_link_is_not_written_through"),
    ("F95", "test_audit::test_a_planted_fault_is_found"),
    ("F95", "test_audit::test_a_fault_ends_the_command_with_its_own_status"),
    ("T01", NAMED),
    ("T01", "test_modeling_pretrained::test_a_prompt_with_a_token_beyond_the_tables_is_refused"),
    ("T02", SAME),
    ("T02", NAMED),
    ("T02", "test_checkpoint_geometry::test_the_fields_of_each_family_are_those_of_the_library"),
    ("T03", SAME),
    ("T03", NAMED),
    ("T03", "test_session_open::test_end_tokens_are_those_of_the_librarys_generate"),
    ("T03", "test_checkpoint_repository::test_what_ends_an_answer_is_what_the_library_reads"),
    ("T05", SAME),
    ("T05", NAMED),
    ("T06", SAME),
    ("T06", "test_modeling_rope::test_room_that_is_not_used_changes_nothing"),
    ("T06", "test_checkpoint_repository::test_a_conversation_that_passes_the_switch_is_read_anew"),
    ("T10", "test_planning_plan::test_no_4_bit_head_is_planned_for_a_vocabulary_that_no_kernel_takes"),
    ("T12", SAME),
    ("T12", NAMED),
    ("T21", SAME),
    ("T21", NAMED),
    ("T30", SAME),
    ("T30", "test_checkpoint::test_the_index_decides_where_a_tensor_is"),
    ("T31", SAME),
    ("T31", "test_checkpoint::test_the_index_decides_where_a_tensor_is"),
    ("T32", SAME),
    ("T32", NAMED),
    ("T33", NAMED),
    ("T33", "test_checkpoint_repository::test_a_method_over_whole_weights_is_a_note"),
    ("T34", NAMED),
    ("T34", "test_checkpoint_safetensors_header::test_a_type_that_is_not_known_is_not_called_damage"),
    ("T35", NAMED),
    ("T35", "test_checkpoint_repository::test_other_forms_of_a_tokenizer"),
    ("A17", "test_checkpoint_confinement::test_links_out_of_a_users_directory_are_followed_when_asked_to"),
    ("T37", NAMED),
    (
        "T37",
        "test_checkpoint_repository::test_a_single_file_beside_an_index_is_what_the_library_reads_and_is_said",
    ),
    ("T37", "test_checkpoint_repository::test_places_that_hold_no_usable_model_are_named"),
    ("T04", f"{LIBRARY}::test_a_stop_string_that_is_or_spans_a_special_token_ends_the_answer"),
    ("T04", f"{LIBRARY}::test_an_answer_ends_where_a_search_of_the_whole_text_ends_it"),
    ("T07", f"{LIBRARY}::test_pieces_joined_are_the_text_decoded_whole"),
    ("T07", f"{LIBRARY}::test_a_skipped_special_token_takes_no_space_with_it"),
    ("T07", f"{LIBRARY}::test_a_run_of_byte_tokens_waits_until_it_is_whole_or_spoiled"),
    ("A08", f"{PRETRAINED}::test_a_prompt_on_which_the_tokenizer_panics_is_refused_in_one_line"),
    ("A08", f"{PRETRAINED}::test_a_decoder_that_panics_is_an_error_of_the_model"),
    ("A08", f"{PRETRAINED}::test_a_tokenizer_that_panics_while_it_is_read_is_damaged"),
    ("A08", f"{PRETRAINED}::test_what_is_no_failure_of_the_tokenizer_passes"),
    ("A02", f"{TEMPLATE}::test_a_template_that_takes_too_long_is_stopped"),
    ("A02", f"{TEMPLATE}::test_the_clock_on_the_wall_ends_what_takes_no_processor_time"),
    ("A03", f"{TEMPLATE}::test_a_template_that_takes_too_much_memory_is_stopped"),
    ("A03", f"{TEMPLATE}::test_a_text_that_no_pipe_could_bring_is_refused"),
    ("A14", f"{TEMPLATE}::test_a_template_that_cannot_be_used_says_why"),
    ("A14", "test_session_prompt::test_a_template_that_cannot_be_used_is_refused_before_weights_are_read"),
    ("A14", "test_session_prompt::test_a_template_that_only_refuses_a_system_message_is_no_obstacle"),
    ("T23", "test_cli_chat::test_a_message_that_the_template_refuses_is_said_and_the_chat_goes_on"),
    (
        "T23",
        "test_session_prompt::test_a_message_that_the_template_refuses_leaves_the_conversation_as_it_was",
    ),
    ("A15", f"{RUN}::test_an_answer_of_one_token_has_no_rate"),
    ("A15", f"{RUN}::test_nouns_follow_their_counts"),
    ("A15", "test_cli_live::test_statistics_say_speed_time_and_memory"),
    ("T36", "test_checkpoint_confinement::test_a_directory_of_links_that_the_user_made_is_read"),
    ("T36", "test_checkpoint_confinement::test_a_blob_that_is_on_another_disk_is_read"),
    ("T36", REFUSED),
    ("T36", "test_hub_model_name::test_a_folder_of_the_hubs_cache_means_its_snapshot"),
    ("T36", f"{STAMP}::test_a_copy_with_new_times_is_told_from_other_weights_and_no_layer_is_made_again"),
    ("T36", "test_substitutes_preparation::test_a_copy_in_another_place_takes_the_layers_that_are_there"),
    ("T36", f"{TRUST}::test_a_home_that_is_read_only_is_enough_to_run_and_to_see_that_all_is_prepared"),
    ("T61", f"{EIGHT_BIT}::test_tokens_are_those_of_the_widened_model_from_half_the_bytes"),
    ("T61", f"{EIGHT_BIT}::test_weights_are_those_of_the_library"),
    ("T62", f"{EIGHT_BIT}::test_what_is_not_run_is_refused_by_name"),
    ("T63", f"{EIGHT_BIT}::test_what_is_not_run_is_refused_by_name"),
    ("T64", f"{EIGHT_BIT}::test_a_changed_scale_is_found_and_the_note_names_what_is_not_used"),
    ("T38", "test_hub_mirrors::test_what_the_listing_says_is_enough"),
    ("T38", "test_hub_mirrors::test_headers_in_other_forms"),
    ("T38", "test_hub_mirrors::test_what_lacks_is_named"),
    ("T39", f"{FAULTS}::test_two_preparations_where_locks_do_not_work"),
    ("T39", f"{FAULTS}::test_two_preparations_side_by_side_where_locks_do_not_work"),
    ("T39", f"{FAULTS}::test_another_process_that_never_stops_is_named"),
    ("T39", f"{DOWNLOAD}::test_two_downloads_where_locks_do_not_work"),
    ("T39", "test_files_temp_names::test_of_a_process_elsewhere_only_long_silence_counts"),
    ("T42", "test_checkpoint_model_sampling::test_the_scores_are_those_of_the_librarys_processors"),
    ("T42", "test_checkpoint_model_sampling::test_broken_values_are_named_unless_a_flag_replaces_them"),
    (
        "T42",
        "test_session_sampling::test_what_cannot_be_computed_is_refused_if_asked_for_and_noted_in_a_chat",
    ),
    ("T42", "test_cli_sampling::test_run_says_that_the_models_own_settings_are_not_used"),
    ("A16", "test_cli_sampling::test_a_bad_bias_file_is_refused_by_name"),
    ("A16", "test_session_sampling::test_a_bias_of_no_token_is_refused"),
    ("T41", "test_cli_models::test_remove_refuses_what_a_run_uses"),
    ("A07", REFUSED),
    ("A07", "test_hub_model_name::test_names"),
    (
        "A11",
        f"{TRUST}::test_a_target_file_that_changes_while_answering_ends_the_answer_before_its_next_token",
    ),
    ("A11", "test_checkpoint::test_weights_written_in_use_are_noticed_although_the_time_is_put_back"),
    ("A11", f"{STAMP}::test_weights_of_the_same_shape_with_the_old_time_are_not_paired"),
    ("A13", REFUSED),
    ("A05", f"{BOUNDARY}::test_a_signal_during_an_import_ends_the_process_whatever_the_library_makes_of_it"),
    ("A05", f"{BOUNDARY}::test_a_signal_is_reported_whatever_exception_it_has_become"),
    ("A06", f"{BOUNDARY}::test_no_signal_and_no_exit_handler_comes_after_the_last_line"),
    ("A10", f"{BOUNDARY}::test_no_signal_and_no_exit_handler_comes_after_the_last_line"),
    ("A10", f"{BOUNDARY}::test_a_second_ctrl_c_at_once_is_the_same_one"),
    ("A12", f"{BOUNDARY}::test_a_signal_that_was_ignored_stays_ignored"),
    ("A12", "test_probe_machine::test_the_timing_process_ends_with_the_one_that_started_it"),
    ("T08", f"{RUN}::test_a_piped_prompt_is_text_however_it_was_written"),
    ("T08", f"{RUN}::test_an_argument_and_a_pipe_are_both_asked"),
    ("T08", f"{RUN}::test_an_empty_pipe_beside_an_argument_changes_nothing"),
    ("T08", f"{RUN}::test_nothing_is_read_beside_an_argument_where_nothing_is_piped"),
    ("T08", f"{RUN}::test_a_pipe_that_stays_open_is_waited_for_aloud"),
    ("T09", "test_streaming_host_memory::test_the_least_limit_counts_and_page_cache_is_not_taken"),
    ("T09", "test_streaming_host_memory::test_a_budget_beyond_the_limit_is_refused_and_names_it"),
    ("T40", "test_probe_machine::test_costs_of_another_instruction_set_quota_or_core_count_are_timed_anew"),
    ("T40", "test_probe_machine::test_plan_finds_the_costs_of_a_run_under_a_limit_of_threads"),
    ("T40", "test_session_openmp::test_a_quota_of_processor_time_counts_as_cores"),
    ("A09", "test_cli_failures::test_too_little_address_space_is_told_before_a_library_crashes"),
    (
        "A09",
        "test_streaming_host_memory::test_too_little_for_the_libraries_is_refused_before_they_are_loaded",
    ),
    ("A09", "test_streaming_host_memory::test_what_the_libraries_leave_of_a_limit_is_the_most_of_a_budget"),
    ("T22", "test_session_open_files::test_a_model_of_more_files_than_may_be_open_is_read"),
    ("T22", "test_session_open_files::test_the_command_line_raises_the_limit"),
    ("T22", "test_session_open_files::test_where_no_file_can_be_opened_the_limit_is_named"),
    ("T20", "test_probe_machine::test_no_temporary_directory_is_needed_to_time_the_machine"),
    ("T20", "test_probe_machine::test_a_home_that_cannot_be_written_costs_only_the_record"),
    ("T20", "test_probe_machine::test_without_a_home_directory_the_machine_is_timed_each_time"),
    ("T20", "test_probe_machine::test_plan_works_without_a_home_directory"),
    ("T20", "test_probe_machine::test_a_use_that_cannot_be_recorded_is_said"),
    ("T20", "test_config::test_a_home_that_may_not_be_read_has_no_settings"),
    ("T20", "test_hub_source_model::test_without_a_home_directory_no_directory_is_made_for_downloads"),
    ("A01", "test_session_openmp::test_the_users_spin_count_wins_but_threads_are_granted"),
    ("A01", "test_modeling_self_check::test_products_that_leave_results_unwritten_are_refused"),
    ("A01", "test_modeling_self_check::test_a_shortage_of_threads_that_begins_later_is_found"),
    ("A01", f"{TRUST}::test_an_answer_ends_when_products_are_no_longer_whole"),
    ("A04", "test_session_memory::test_a_run_stays_within_its_budget_and_imports_first"),
]
"""Number in the list of failures, and a test that holds it."""


def functions_of(module: str) -> set[str]:
    tree = ast.parse((TESTS / f"{module}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def rows_of_the_document() -> dict[str, list[str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in FAILURES.read_text().splitlines()
    ]
    return {row[0]: row[1:] for row in rows if re.fullmatch(r"[AFT]\d+", row[0])}


@pytest.mark.parametrize("test", sorted({test for _, test in COVERED}))
def test_every_named_test_exists(test):
    module, _, name = test.partition("::")
    assert name in functions_of(module)


def test_the_document_lists_exactly_what_is_covered():
    rows = rows_of_the_document()
    assert sorted(rows) == sorted({number for number, _ in COVERED})
    assert len(rows) >= 40
    for number, (what, shown, status) in rows.items():
        assert what, number
        assert shown, number
        assert re.fullmatch(r"[0-9]+(, [0-9]+)*", status), number

"""`low_rank_attention`: project the keys and values of an encoder along the text (Linformer)."""

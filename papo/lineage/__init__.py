"""What a run was made of, kept on disk: found again by any of its ids, compared with another, and made again."""

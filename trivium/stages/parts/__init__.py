"""What several kinds of stage share."""

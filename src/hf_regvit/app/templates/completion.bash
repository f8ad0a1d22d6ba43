# Completion of regvit for bash, written by `regvit completion bash`.
_regvit() {
    local word=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]} option= index
    local -a daily others values
    COMPREPLY=()
    [[ $word == = ]] && word=
    for ((index = COMP_CWORD - 1; index > 1; index--)); do # bash splits --option=value into three words
        [[ ${COMP_WORDS[index]} == --* ]] && option=${COMP_WORDS[index]#--} && break
    done
    local distance=$((COMP_CWORD - index))
    [[ $distance -gt 1 && ${COMP_WORDS[index + 1]} == = ]] && ((distance--))
    case $command in
@options@
    esac
    case $command:${option//-/_}:$distance in
@values@
    esac
    [[ $word == -* || ${#values[@]} -eq 0 ]] && values=(@options)
    ((COMP_CWORD == 1)) && values=(@commands@)
    case ${values[0]} in
    @files) return ;; # to readline, which completes file names
    @none) values=() ;;
    @options)
        values=("${daily[@]}")
        ((${#word} > 2)) && values+=("${others[@]}")
        ;;
    esac
    compopt +o default 2>/dev/null # bash 3 has no compopt, and offers file names where nothing else fits
    COMPREPLY=($(compgen -W "${values[*]}" -- "$word"))
}
complete -o default -F _regvit regvit

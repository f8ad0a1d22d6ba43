#compdef regvit
# Completion of regvit for zsh, written by `regvit completion zsh`.
_regvit() {
    local command=$words[2] option= index=2 distance
    local -a commands daily others values
    if ((CURRENT == 2)); then
        commands=(@commands@)
        _describe -t commands command commands
        return
    fi
    case $command in
@options@
    esac
    if [[ $PREFIX == --*=* ]]; then
        option=${${PREFIX%%=*}#--}
        distance=1
        compset -P '--*='
    else
        for ((index = CURRENT - 1; index > 2; index--)); do
            [[ $words[index] == --* ]] && option=${${words[index]%%=*}#--} && break
        done
        distance=$((CURRENT - index))
        [[ $words[index] == --*=* ]] && ((distance++))
    fi
    case $command:${option//-/_}:$distance in
@values@
    esac
    [[ $PREFIX == -* || $#values -eq 0 ]] && values=(@options)
    case $values[1] in
    @files) _files ;;
    @none) _message value ;;
    @options)
        (($#PREFIX > 2)) && daily+=($others)
        _describe -t options option daily
        ;;
    *) compadd -a values ;;
    esac
}
if [[ $funcstack[1] == _regvit ]]; then # loaded from a folder in fpath
    _regvit "$@"
else
    (($+functions[compdef])) || { autoload -Uz compinit && compinit; }
    compdef _regvit regvit
fi
